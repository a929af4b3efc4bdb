"""First stages: autoencoders that make latents of images, which are denoised, and images of latents.

VQ and KL autoencoders of latent diffusion (2112.10752) come from diffusers; our own is `codecs.autoencoder`.
`encode_latents` stores the latents of all images once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ebdiff.codecs.codec import Carried, Codec, open_codec
from ebdiff.data.archives import not_had
from ebdiff.data.dataset import Cond, open_pixels, to_float, to_uint8
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.places import given
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import digest
from ebdiff.nets.diffusers_ import diffusers_for
from ebdiff.system import parallel
from ebdiff.system.batches import Batches
from ebdiff.system.errors import Unusable, UserError, first_line
from ebdiff.system.files import load_memmap, read_json, sha256, write_json
from ebdiff.system.ledger import ledger

BLOCK = 256  # images that a killed job may have to encode again
PIXELS = 2**18  # of images that pass through the network together, so that memory stays bounded


class FirstStage(Codec):
    """An autoencoder, opened.

    Attributes:
        DECODES: those of its network's modules that decoding takes.
        network: in eval mode, on the device.
        sha256: hash of its weights, by which latents tell who made them.

    Args:
        experiment, device: as for `Codec`.
        network: one that only decodes; None: the experiment's.

    Raises:
        UserError: it makes latents of another shape, or those that there are were made by another one.
    """

    DECODES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, experiment: Experiment, device: torch.device, network: nn.Module | None = None):
        super().__init__(experiment, device)
        self.network = self.opened() if network is None else network
        self.network.to(device).eval().requires_grad_(False)
        if network is not None:
            return
        self.sha256 = _hash_of(self.network)
        self._check_shape()
        manifest = layout.path(layout.LATENTS_MANIFEST, experiment=experiment.name)
        if manifest.exists() and read_json(manifest)["first_stage"] != self.sha256:
            raise Unusable(manifest.with_suffix(".npy"), "made by another first stage than that of now")

    def opened(self) -> nn.Module:
        """The network with its weights."""
        raise NotImplementedError

    @classmethod
    def built(cls, experiment: Experiment, config: Mapping[str, Any]) -> nn.Module:
        """The network of the `config` that was carried, its weights left open."""
        raise NotImplementedError

    def carried(self) -> Carried:
        """The decoder's side.

        Raises:
            UserError: the member doesn't say which that is.
        """
        if not self.DECODES:
            raise UserError(
                f"codec.kind {self.experiment.codec.kind}: {type(self).__name__}.DECODES names no module"
            )
        tensors = self.network.state_dict().items()
        return Carried({n: t for n, t in tensors if n.split(".")[0] in self.DECODES}, {})

    @classmethod
    def decoder(cls, experiment: Experiment, device: torch.device, carried: Carried) -> Self:
        try:
            with torch.device("meta"):
                network = cls.built(experiment, carried.config)
            for name in {n.split(".")[0] for n in network.state_dict()}.difference(cls.DECODES):
                delattr(network, name)
            network.load_state_dict(carried.tensors, assign=True)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            kind = experiment.codec.kind
            raise UserError(
                f"codec.kind {kind}: tensors don't fit its decoder: {first_line(error)}"
            ) from None
        return cls(experiment, device, network)

    def latents(self, x: Tensor) -> Tensor:
        """Latents (B, c, h, w) of images (B, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    def images(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], of latents (B, c, h, w)."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> Tensor:
        """The latents of images uint8 (B, H, W, C): float32 (B, *items.shape), on the device."""
        return torch.cat([self.latents(to_float(torch.tensor(x).to(self.device))) for x in self._few(images)])

    @torch.inference_mode()
    def decode(self, items: Tensor, cond: Cond) -> np.ndarray:
        """The images of latents: uint8 (B, H, W, C)."""
        return np.concatenate([to_uint8(self.images(z)) for z in self._few(items)])

    def _few(self, rows: np.ndarray | Tensor) -> list[np.ndarray | Tensor]:
        """Rows in as large parts as pass through the network together."""
        size = max(1, PIXELS // math.prod(self.experiment.dataset.items.shape[1:]))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _check_shape(self) -> None:
        """Encode a small blank image: its latents' shape is the network's."""
        channels, factor = self.experiment.dataset.items.shape[0], self.experiment.codec.factor
        want = (self.experiment.codec.channels, 2, 2)
        try:
            blank = torch.zeros(1, channels, 2 * factor, 2 * factor, device=self.device)
            shape = tuple(self.latents(blank).shape[1:])
        except RuntimeError as error:
            raise UserError(
                f"codec.kind {self.experiment.codec.kind}: this first stage doesn't encode images of "
                f"{channels} channels ({first_line(error)}); change dataset.channels or the weights"
            ) from None
        if shape != want:
            raise UserError(
                f"codec.channels and codec.factor: this first stage makes latents {shape} of images of "
                f"{2 * factor} pixels, not {want}; change them, or the weights"
            )


def _hash_of(network: nn.Module) -> str:
    """Hex SHA-256 of a network's tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()


class Pretrained(FirstStage):
    """An autoencoder of diffusers, from a local folder or the hub."""

    architecture: str  # its class in diffusers

    @classmethod
    def built(cls, experiment: Experiment, config: Mapping[str, Any]) -> nn.Module:
        return cls._library(experiment).from_config(config)

    @classmethod
    def _library(cls, experiment: Experiment) -> Any:
        """The architecture's class in diffusers."""
        return getattr(diffusers_for(f"codec.kind {experiment.codec.kind}"), cls.architecture)

    def carried(self) -> Carried:
        """The decoder's side, and the config that diffusers builds it from, without paths of this machine."""
        told = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        return super().carried()._replace(config=told)

    def opened(self) -> nn.Module:
        """The network with its weights; pickles are never loaded.

        Raises:
            UserError: not there, or weights of another architecture.
        """
        folder, kind = _folder(self.experiment), self.experiment.codec.kind
        where = f"codec.kind {kind}, {folder}"
        network = self._library(self.experiment)
        if (found := read_json(folder / "config.json").get("_class_name")) != self.architecture:
            raise UserError(
                f"{where}: holds {found}, not {self.architecture}; change codec.kind or the weights"
            )
        try:
            network, told = network.from_pretrained(
                folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
            wrong = [*told["missing_keys"], *told["unexpected_keys"]]
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{where}: these weights can't be used ({' '.join(str(error).split())[:200]}); give others"
            ) from None
        if wrong:
            raise UserError(f"{where}: these weights are another architecture's ({wrong[0]}); give others")
        return network.float()

    def images(self, z: Tensor) -> Tensor:
        return self.network.decode(z / self.experiment.codec.scale).sample


class VQ(Pretrained):
    """What the encoder says is denoised before it is quantised; `decode` quantises it."""

    architecture = "VQModel"
    DECODES = ("quantize", "post_quant_conv", "decoder")

    def latents(self, x: Tensor) -> Tensor:
        return self.network.encode(x).latents * self.experiment.codec.scale


class KL(Pretrained):
    """The mean of the posterior is denoised."""

    architecture = "AutoencoderKL"
    DECODES = ("post_quant_conv", "decoder")

    def latents(self, x: Tensor) -> Tensor:
        return self.network.encode(x).latent_dist.mean * self.experiment.codec.scale


def _folder(experiment: Experiment) -> Path:
    """Where config.json and weights lie: `codec.path`, or the cache of the hub's library.

    Raises:
        UserError: they aren't there, or can't be had.
    """
    codec = experiment.codec
    if path := given(codec.path, "codec.path") if codec.path else None:
        if not (path / "config.json").is_file():
            raise UserError(f"codec.path {path}: no config.json there; give a folder as diffusers saves it")
        return path
    if not codec.hub:
        raise UserError(f"codec.path: nothing is left of {codec.path!r}; set it, or codec.hub")
    diffusers_for(f"codec.kind {codec.kind}")
    from huggingface_hub import snapshot_download  # comes with it

    owner, name, *folder = codec.hub.split("/")
    wanted = ["/".join([*folder, file]) for file in ("config.json", "*.safetensors")]
    try:
        found = Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted), *folder)
    except (OSError, ValueError) as error:
        raise not_had(f"codec.hub {codec.hub}", "codec.path", error) from None
    if not (found / "config.json").is_file():
        raise UserError(
            f"codec.hub {codec.hub}: no config.json there; name the folder too, owner/name/folder"
        )
    return found


def encode_latents(experiment: Experiment, device: torch.device) -> None:
    """Encode all images of the dataset once (verb `encode-latents`), block by block, each kept.

    Writes latents.npy, float16 (N, *items.shape), and a manifest with their statistics and who made them.
    Memory holds a block, whatever N; the disk for a while all blocks and latents.npy.

    Raises:
        UserError: the codec encodes nothing, its first stage can't be used, or makes what isn't finite.
    """
    if not experiment.codec.ENCODED:
        raise UserError(f"{experiment.name}: codec.kind {experiment.codec.kind} encodes nothing")
    work = Work(experiment, "encode-latents")
    output, manifest = work.path(layout.LATENTS), work.path(layout.LATENTS_MANIFEST)
    if parallel.first():
        manifest.unlink(missing_ok=True)  # never beside latents that it doesn't describe
    parallel.barrier()
    codec, pixels = open_codec(experiment, device), open_pixels(experiment.dataset.name)

    def encoded(rows: list[int]) -> dict[str, np.ndarray]:
        return {"latents": codec.encode(pixels[rows]).half().cpu().numpy()}

    batches = Batches(layout.state_of(output), digest(work.stamp, codec.sha256, BLOCK))
    with batches.holding():
        batches.fill(len(pixels), BLOCK, encoded, "encode-latents")
        if not parallel.first():
            return
        seconds = batches.join("latents", output, len(pixels))
        latents = load_memmap(output)
        blocks = (latents[first : first + BLOCK] for first in range(0, len(latents), BLOCK))
        mean, std = statistics(blocks)
        if not np.isfinite(std).all():
            raise UserError(f"codec.kind {experiment.codec.kind}: latents beyond float16; scale them down")
        entry = ledger(
            device,
            first_stage=codec.sha256,
            count=len(latents),
            shape=list(latents.shape[1:]),
            mean=mean.tolist(),
            std=std.tolist(),
            sha256=sha256(output),
            seconds=round(seconds, 3),
        )
        write_json(manifest, entry)
        work.end()
        batches.forget()
    print(f"{len(latents)} latents of {latents.shape[1:]}, mean {mean.mean():.3f}, std {std.mean():.3f}")


def statistics(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of latents (n, c, h, w), in blocks: float64 (c,) each.

    By sums of squares in float64, whose 53 bits lose none of a float16's 11 to cancellation.
    """
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        x = block.astype(np.float64).swapaxes(0, 1).reshape(block.shape[1], -1)
        count, total, squares = count + x.shape[1], total + x.sum(axis=1), squares + np.square(x).sum(axis=1)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))
