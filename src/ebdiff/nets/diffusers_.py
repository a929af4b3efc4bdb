"""diffusers, imported where a network or a codec of it is built."""

from __future__ import annotations

from types import ModuleType

from ebdiff.system.errors import UserError


def diffusers_for(asked: str) -> ModuleType:
    """The library, without torchvision where that can't be imported.

    Args:
        asked: the key and value that want it, for the message.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import diffusers.utils.import_utils as there
    except ModuleNotFoundError:
        raise UserError(f"{asked} needs diffusers: pip install 'ebdiff[latent]'") from None
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # PyPI's beside a CPU build of torch
        there._torchvision_available = False
    import diffusers

    return diffusers
