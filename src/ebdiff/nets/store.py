"""One way to store any network: safetensors whose metadata tells its config, its items and its story.

Loading builds the dense network from config and items, adopts the shapes found in the file for every
layer, then assigns the tensors: the same call reads dense networks,
tickets and experts. The format notices no changed byte, so the metadata holds a checksum of everything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ebdiff.experiment.members import Architecture, Items, config_of
from ebdiff.nets import denoiser
from ebdiff.nets.denoiser import Denoiser
from ebdiff.system.draws import generator
from ebdiff.system.errors import Unusable, UserError, damaged, first_line
from ebdiff.system.files import CHECKSUM, TOLD, checksum, read_told, replacing


def save(
    path: Path, tensors: Mapping[str, Tensor], architecture: Architecture, story: Mapping[str, Any]
) -> None:
    """Write tensors atomically, with the dense network's architecture and a story as JSON metadata."""
    config, items = architecture
    told = {"network": config.model_dump(mode="json"), "items": items._asdict(), "story": story}
    write(path, tensors, told)


def load(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], Architecture, dict[str, Any]]:
    """Read the tensors whose names begin with `prefix` (cut off), the dense architecture and the story.

    Raises:
        Missing: it isn't there.
        Unusable: it isn't what was written, or wasn't written by `save`.
    """
    tensors, told = read(path, prefix)
    try:
        config = config_of("network", told["network"]).model_validate(told["network"])
        items = Items(**{**told["items"], "shape": tuple(told["items"]["shape"])})
    except (KeyError, TypeError, ValueError):  # pydantic's errors are ValueErrors
        raise Unusable(path, "holds no ebdiff network") from None
    if not tensors:
        raise Unusable(path, f"holds nothing named {prefix}*")
    return tensors, Architecture(config, items), told["story"]


def story(path: Path) -> dict[str, Any]:
    """Only the story of a stored network; reads no tensor, so the checksum isn't compared.

    Raises:
        Missing, Unusable: as `load`.
    """
    told = read_told(path)
    if "story" not in told:
        raise Unusable(path, "holds no ebdiff network")
    return told["story"]


def write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Write tensors atomically, with JSON metadata and a checksum of both."""
    # safetensors refuses views and channels_last.
    whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    found = checksum([_text(told), *(part for name in sorted(whole) for part in _buffers(name, whole[name]))])
    # One key: safetensors writes several in random order, and equal files must have equal bytes.
    metadata = {TOLD: json.dumps({CHECKSUM: found, **told})}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: the tensors whose names begin with `prefix`, cut off, and the metadata.

    Raises:
        Missing: it isn't there.
        Unusable: it isn't what was written.
    """
    told, tensors = read_told(path), {}

    def parts() -> Iterator[Any]:  # one tensor at a time: a state holds four times what sampling needs
        yield _text(told)
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                if name.startswith(prefix):
                    tensors[name.removeprefix(prefix)] = tensor
                yield from _buffers(name, tensor)

    expected = told.pop(CHECKSUM, None)
    try:
        found = checksum(parts())
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None
    if found != expected:
        raise damaged(path, "its checksum differs")
    return tensors, told


def _text(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told).encode()


def _buffers(name: str, tensor: Tensor) -> tuple[bytes, np.ndarray]:
    """What a checksum is made of: a tensor's name and form, and its bytes."""
    form = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    return form, tensor.reshape(-1).view(torch.uint8).numpy()


def adopt_shapes(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Resize every layer to the shapes in `tensors`, in place.

    Raises:
        KeyError: a parameter has no tensor.
    """
    for name, module in network.named_modules():
        sizes = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            tensor = tensors[f"{name}.{key}".removeprefix(".")]
            sizes[key] = tuple(tensor.shape)
            setattr(module, key, nn.Parameter(torch.empty_like(tensor, device=parameter.device)))
        match module:
            case nn.Conv2d():
                module.out_channels, module.in_channels = sizes["weight"][:2]
            case nn.Linear():
                module.out_features, module.in_features = sizes["weight"]
            case nn.Embedding():
                module.num_embeddings, module.embedding_dim = sizes["weight"]
            case nn.GroupNorm(affine=True):
                (module.num_channels,) = sizes["weight"]
            case nn.LayerNorm(elementwise_affine=True):
                module.normalized_shape = sizes["weight"]
            case nn.RNNBase():  # the other layers' sizes are read from their weights
                module.input_size, module.hidden_size = sizes["weight_ih_l0"][1], sizes["weight_hh_l0"][1]


def build(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Denoiser:
    """A network of the given architecture and tensors, pruned or not, owning copies of them.

    Raises:
        UserError: the tensors don't belong to a network of that architecture.
    """
    with torch.device("meta"):
        network = denoiser.build(*architecture)
    try:
        adopt_shapes(network, tensors)
        network.load_state_dict({k: v.clone() for k, v in tensors.items()}, assign=True)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"tensors don't fit the network's config: {first_line(error)}") from None
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network


def initialise(network: nn.Module, seed: int, stream: str) -> None:
    """Fresh weights in place: PyTorch's defaults, U(-1, 1) / sqrt(fan-in), norms at identity.

    Of a recurrent layer fan-in is its hidden size; embeddings are standard normal. Drawn from (seed,
    stream, layer) rather than torch's global generator, which keeps only 32 bits of its seed.

    Raises:
        TypeError: a layer for which there is no rule.
    """
    for i, module in enumerate(network.modules()):
        draws = generator(seed, f"{stream}/init", i)
        for key, parameter in module.named_parameters(recurse=False):
            values = _initial(module, key, tuple(parameter.shape), draws)
            parameter.data = torch.from_numpy(values).to(parameter.device, torch.float32)


def _initial(module: nn.Module, key: str, shape: tuple[int, ...], draws: np.random.Generator) -> np.ndarray:
    """The first values of a layer's parameter."""
    match module:
        case nn.Conv2d() | nn.Linear():
            bound = module.weight[0].numel() ** -0.5
            return draws.uniform(-bound, bound, shape)
        case nn.RNNBase():
            bound = module.hidden_size**-0.5
            return draws.uniform(-bound, bound, shape)
        case nn.Embedding():
            return draws.standard_normal(shape)
        case nn.GroupNorm() | nn.LayerNorm():
            return np.full(shape, 1.0 if key == "weight" else 0.0)
    raise TypeError(f"no rule says how the {key} of a {type(module).__name__} begins")


def fresh(
    architecture: Architecture, seed: int, stream: str, shapes: Mapping[str, Tensor] | None = None
) -> Denoiser:
    """A network with fresh weights: dense, or of the given shapes (meta tensors will do)."""
    network = denoiser.build(*architecture)
    if shapes is not None:
        adopt_shapes(network, shapes)
    initialise(network, seed, stream)
    return network
