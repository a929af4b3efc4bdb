"""One image: from the bytes of its file to the pixels that training sees, by one written rule.

1. Only the formats below are opened, at most `PIXELS` pixels, the first frame alone; EXIF orientation is
   ignored.
2. The crop of the experiment (`none` asks for a square image).
3. 16 bits become 8 (value / 257, rounded); what is transparent is laid on white; then everything is
   converted to RGB (3 channels) or to grey (1 channel, ITU-R 601 weights).
4. Resized to `dataset.image_size` by Pillow's filter `dataset.resize`, which averages when it shrinks (no
   aliasing). Bilinear is torchvision's default, and so what the public pipelines of CelebA and LSUN do
   (LSUN's resizes first and then crops: the same but for the outermost pixels and half-pixel roundings).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ebdiff.system.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
PIXELS = 89_478_485  # of one image: Pillow's own limit, 1/4 GiB of RGB, taken as an error
FILE_BYTES = 256 * 2**20  # of one image file, packed or unpacked

# Aligned CelebA images are 178 x 218; 128 x 128 of it around row 121, column 89: left, upper, right, lower.
CELEBA_SIZE, CELEBA_BOX = (178, 218), (89 - 64, 121 - 64, 89 + 64, 121 + 64)

Crop = Literal["none", "centre", "celeba"]
Filter = Literal["bilinear", "bicubic"]


class Broken(Exception):
    """An image that can't be read; the message says why."""


@dataclass(frozen=True)
class Item:
    """One stored image."""

    name: str  # for messages
    read: Callable[[], bytes | np.ndarray]  # the file, or uint8 (H, W, C); called once, in any thread
    label: int | None = None  # its class


def opened(item: Item) -> Image.Image:
    """The image, decoded; Broken if it can't be."""
    try:
        stored = item.read()
        if isinstance(stored, np.ndarray):
            return Image.fromarray(stored.squeeze(-1) if stored.shape[-1] == 1 else stored)
        image = Image.open(io.BytesIO(stored), formats=FORMATS)
        if image.width * image.height > PIXELS:
            raise Broken(f"{image.width}x{image.height} pixels look like a decompression bomb")
        image.load()
    except Broken:
        raise
    except Image.DecompressionBombError as error:
        raise Broken(f"a decompression bomb: {error}") from None
    except Image.UnidentifiedImageError:
        raise Broken(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # damaged files make Pillow's and zipfile's readers raise almost anything
        raise Broken(" ".join(str(error).split()) or type(error).__name__) from None
    return image


def converted(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode L (1 channel) or RGB (3); Broken if no rule leads there (32-bit samples, LAB ...)."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise Broken("samples of 32 bits")
        image = Image.fromarray(np.rint(samples / 257).astype(np.uint8))
    if image.mode == "F":
        raise Broken("samples of 32 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise Broken(str(error)) from None


def cropped(image: Image.Image, crop: Crop, name: str) -> Image.Image:
    """The square part that `dataset.crop` asks for; UserError where it doesn't allow this shape."""
    width, height = image.size
    if crop == "celeba":
        if image.size != CELEBA_SIZE:
            raise UserError(
                f"{name}: {width}x{height} pixels, but crop: celeba is for the aligned 178x218 images; "
                "set dataset.crop to centre or none"
            )
        return image.crop(CELEBA_BOX)
    if width == height:
        return image
    if crop == "none":
        raise UserError(
            f"{name}: {width}x{height} pixels, not square; "
            "set dataset.crop to centre (the largest central square)"
        )
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return image.crop((left, upper, left + side, upper + side))


def pixels(item: Item, size: int, channels: int, crop: Crop, resize: Filter) -> tuple[np.ndarray, bool]:
    """An item by the rule above.

    Returns:
        uint8 (size, size, channels), 1 or 3 of these, and whether it was resized.

    Raises:
        Broken: the image can't be read.
        UserError: it can, but is of a shape that the crop doesn't allow.
    """
    image = converted(cropped(opened(item), crop, item.name), channels)
    resized = image.size != (size, size)
    if resized:
        image = image.resize((size, size), Image.Resampling[resize.upper()])
    return np.asarray(image).reshape(size, size, channels), resized


@dataclass(frozen=True)
class Files:
    """Stored images as an array of them, each of a shape (H, W, C): indexed by rows, decoded each time."""

    items: list[Item]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Images uint8 (len(rows), H, W, C); UserError if one can't be read, or has another size."""
        found, (height, width, channels) = np.empty((len(rows), *self.shape), np.uint8), self.shape
        for out, item in zip(found, (self.items[row] for row in rows), strict=True):
            try:
                image = converted(opened(item), channels)
            except Broken as error:
                raise UserError(f"{item.name}: {error}") from None
            if image.size != (width, height):
                raise UserError(
                    f"{item.name}: {image.width}x{image.height} pixels, but the real images have "
                    f"{width}x{height}; make all of that size, by the same filter"
                )
            out[:] = np.asarray(image).reshape(self.shape)
        return found
