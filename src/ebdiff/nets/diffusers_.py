"""diffusers, imported only by what is made of its layers: it takes seconds, and is an extra."""

from __future__ import annotations

from types import ModuleType

from ebdiff.system.errors import UserError


def diffusers_for(asked: str) -> ModuleType:
    """The library; without torchvision where that can't be imported, as PyPI's beside a CPU build of torch.

    Args:
        asked: the key and value that want it, such as ``network.kind latent-unet``.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import diffusers.utils.import_utils as found
    except ModuleNotFoundError:
        raise UserError(f"{asked} needs diffusers: pip install 'ebdiff[latent]'") from None
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        found._torchvision_available = False
    import diffusers

    return diffusers
