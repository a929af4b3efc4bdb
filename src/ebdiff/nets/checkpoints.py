"""Public checkpoints of networks."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebdiff.experiment.members import Architecture
from ebdiff.nets.denoiser import build
from ebdiff.system.errors import UserError, first_line
from ebdiff.system.files import open_tensors


def load_checkpoint(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The weights of a public checkpoint under the network's own names, checked against its shapes.

    Understood are safetensors, and PyTorch files of a state dict, alone, under `state_dict`, `ema` or
    `model`, or in DDIM's training list whose last entry is the average. A leading `module.` is cut off.
    PyTorch files are read with `weights_only=True`: nothing in them is executed.

    Args:
        path: .safetensors, .ckpt, .pt or .pth.
        architecture: of the network that the experiment describes.

    Returns:
        float32 tensors by parameter name.

    Raises:
        UserError: missing, unreadable, or of another network.
    """
    try:
        found = _tensors(path) if path.suffix == ".safetensors" else _state_dict(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; dense.from names it") from None
    except UserError:
        raise
    except Exception as error:  # damaged files make torch's restricted reader raise almost anything
        reason = first_line(error, type(error).__name__)
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    with torch.device("meta"):
        network = build(*architecture)
    tensors = network.imported({name.removeprefix("module."): t for name, t in found.items()})
    expected = {name: t.shape for name, t in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: a checkpoint of another network: it has no {name}; see network")
        if tensors[name].shape != shape:
            raise UserError(
                f"{path}: a checkpoint of another network: {name} is {tuple(tensors[name].shape)}, "
                f"network asks for {tuple(shape)}"
            )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise UserError(f"{path}: a checkpoint of another network: {extra[0]} is not part of it; see network")
    return {name: tensors[name].float() for name in expected}


def _tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, the averaged one where there are two."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise UserError(f"{path}: packed, which torch.save never does; don't trust this file")
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, list | tuple):  # DDIM: model, optimiser, epoch, step, average
        content = next((part for part in reversed(content) if isinstance(part, dict)), {})
    for key in ("ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items()
    ):
        raise UserError(f"{path}: holds no state dict of tensors")
    return content
