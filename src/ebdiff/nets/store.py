"""One way to store any network: safetensors whose metadata tells the network's config and story.

Loading builds the dense network from the config, adopts the shapes found in the file for every
convolution, linear layer and norm, then assigns the tensors: the same call reads dense networks,
tickets and experts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ebdiff.experiment.schema import Network
from ebdiff.nets.unet import UNet
from ebdiff.system.draws import generator
from ebdiff.system.errors import Unusable, UserError, damaged, first_line
from ebdiff.system.files import TOLD, read_told, replacing


def save(path: Path, tensors: Mapping[str, Tensor], network: Network, story: Mapping[str, Any]) -> None:
    """Write tensors atomically, with the network's config and story as JSON metadata."""
    write(path, tensors, {"network": network.model_dump(mode="json"), "story": story})


def load(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], Network, dict[str, Any]]:
    """Read the tensors whose names begin with `prefix` (which is cut off), the config and the story.

    Raises:
        Missing: it isn't there.
        Unusable: it isn't what was written, or wasn't written by `save`.
    """
    tensors, told = read(path, prefix)
    try:
        config = Network.model_validate(told["network"])
    except (KeyError, ValueError):  # pydantic's errors are ValueErrors
        raise Unusable(path, "holds no ebdiff network") from None
    if not tensors:
        raise Unusable(path, f"holds nothing named {prefix}*")
    return tensors, config, told["story"]


def story(path: Path) -> dict[str, Any]:
    """Only the story of a stored network; reads no tensor.

    Raises:
        Missing, Unusable: as `load`.
    """
    told = read_told(path)
    if "story" not in told:
        raise Unusable(path, "holds no ebdiff network")
    return told["story"]


def write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Write tensors atomically, with JSON metadata."""
    # safetensors refuses views and channels_last.
    whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            # One key: safetensors writes several in random order, and equal files must have equal bytes.
            save_file(whole, temporary, {TOLD: json.dumps(told)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: the tensors whose names begin with `prefix`, cut off, and the metadata.

    Raises:
        Missing: it isn't there.
        Unusable: it is no such file.
    """
    told = read_told(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in sorted(file.keys()) if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, told
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def adopt_shapes(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Resize every convolution, linear layer and norm to the shapes in `tensors`, in place."""
    for name, module in network.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            continue
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = weight.shape[0]
        for key, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(tensors[f"{name}.{key}"], device=parameter.device)
            setattr(module, key, nn.Parameter(empty))


def build(config: Network, tensors: Mapping[str, Tensor]) -> UNet:
    """A network of the given config and tensors, pruned or not, owning copies of them.

    Raises:
        UserError: the tensors don't belong to a network of that config.
    """
    with torch.device("meta"):
        network = UNet(config)
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

    Drawn from (seed, stream, layer) rather than torch's global generator, which keeps only 32
    bits of its seed.
    """
    for i, module in enumerate(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            draws = generator(seed, f"{stream}/init", i)
            for parameter in module.parameters(recurse=False):
                values = draws.uniform(-bound, bound, tuple(parameter.shape))
                parameter.data = torch.from_numpy(values).to(parameter.device, torch.float32)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def fresh(config: Network, seed: int, stream: str) -> UNet:
    """A dense network with fresh weights."""
    network = UNet(config)
    initialise(network, seed, stream)
    return network
