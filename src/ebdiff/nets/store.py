"""One way to store any network: safetensors whose metadata tells its config, its items and its story.

Loading builds the dense network from config and items, adopts the shapes found in the file for every
layer, then assigns the tensors: the same call reads dense networks, tickets and experts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ebdiff.experiment.members import ITEMS, Architecture, config_of
from ebdiff.nets import denoiser
from ebdiff.nets.denoiser import Denoiser
from ebdiff.system.draws import generator
from ebdiff.system.errors import Unusable, UserError, damaged, first_line
from ebdiff.system.files import TOLD, open_tensors, read_told, replacing

BUFFER = "buffer."  # what a network keeps beside its parameters, in a file of several kinds of weights
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def save(
    path: Path, tensors: Mapping[str, Tensor], architecture: Architecture, story: Mapping[str, Any]
) -> None:
    """Write tensors atomically, with the dense network's architecture and a story as JSON metadata."""
    config, items = architecture
    told = {"network": config.model_dump(mode="json"), "items": items._asdict(), "story": story}
    write(path, tensors, told)


def load(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], Architecture, dict[str, Any]]:
    """Read the tensors whose names begin with `prefix` (cut off), the dense architecture and the story.

    Under a prefix the network's buffers come along by their own names: all that `build` needs.

    Raises:
        Missing: it isn't there.
        Unusable: it isn't what was written, or wasn't written by `save`.
    """
    tensors, told = read(path, prefix)
    try:
        config = config_of("network", told["network"]).model_validate(told["network"])
        items = ITEMS.validate_python(told["items"])
    except (KeyError, TypeError, ValueError):  # pydantic's errors are ValueErrors
        raise Unusable(path, "holds no ebdiff network") from None
    if not tensors:
        raise Unusable(path, f"holds nothing named {prefix}*")
    return tensors, Architecture(config, items), told["story"]


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

    Under a prefix those of a network's buffers too.

    Raises:
        Missing: it isn't there.
        Unusable: it is no such file.
    """
    told = read_told(path)
    try:
        with open_tensors(path, "pt") as file:
            names, kinds = sorted(file.keys()), (prefix, BUFFER) if prefix else ("",)
            found = ((k, n) for k in kinds for n in names if n.startswith(k))
            return {name.removeprefix(kind): file.get_tensor(name) for kind, name in found}, told
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def buffers(network: nn.Module) -> dict[str, Tensor]:
    """What a network keeps beside its parameters, by the name that it has in a file: ``buffer.{name}``."""
    kept = network.state_dict()  # without buffers that aren't meant to be kept
    return {f"{BUFFER}{name}": kept[name] for name, _ in network.named_buffers() if name in kept}


def adopt_shapes(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Resize every layer to the shapes in `tensors`, in place; values are left open.

    Raises:
        KeyError: `tensors` lacks a parameter.
    """
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for key, parameter in own.items():
            tensor = tensors[f"{name}.{key}" if name else key]
            setattr(module, key, nn.Parameter(torch.empty_like(tensor, device=parameter.device)))
        if not own:
            continue
        if isinstance(module, nn.GRU):
            module.hidden_size, module.input_size = module.weight_hh_l0.shape[1], module.weight_ih_l0.shape[1]
        elif isinstance(module, CONVOLUTIONS):
            out, into = module.weight.shape[:2]
            module.out_channels, module.in_channels = out, into * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = len(module.weight)
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)


def build(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Denoiser:
    """A network of the given architecture and tensors, pruned or not, owning copies of them.

    Args:
        architecture: of the dense network.
        tensors: its parameters, and its buffers where it has some, by name.

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
    """Fresh weights in place, as PyTorch's defaults: U(-1, 1) / sqrt(fan-in), norms at identity.

    A GRU's fan-in is its hidden size; an embedding is standard normal. Drawn from (seed, stream, layer)
    rather than torch's global generator, which keeps only 32 bits of its seed. Buffers stay as the
    constructor made them: it must draw random ones from `draws.generator`, or no training can be repeated.

    Raises:
        UserError: a layer with parameters of another kind.
    """
    for i, (name, module) in enumerate(network.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        draws = generator(seed, f"{stream}/init", i)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            for key, parameter in own.items():
                nn.init.constant_(parameter, float(key == "weight"))
            continue
        if isinstance(module, nn.Embedding):
            draw = draws.standard_normal
        elif isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.GRU)):
            fan_in = module.hidden_size if isinstance(module, nn.GRU) else module.weight[0].numel()
            draw = partial(draws.uniform, -(fan_in**-0.5), fan_in**-0.5)
        else:
            layer = f"{name or 'the whole'} ({type(module).__name__})"
            raise UserError(f"network: {layer} has weights of its own, which can't be initialised")
        for parameter in own.values():
            values = torch.from_numpy(draw(size=tuple(parameter.shape)))
            parameter.data = values.to(parameter.device, torch.float32)


def fresh(
    architecture: Architecture, seed: int, stream: str, shapes: Mapping[str, Tensor] | None = None
) -> Denoiser:
    """A network with fresh weights, dense or of given shapes (meta tensors will do)."""
    network = denoiser.build(*architecture)
    if shapes is not None:
        adopt_shapes(network, shapes)
    initialise(network, seed, stream)
    return network
