"""What can stand behind a seam: typed configs of networks, datasets and codecs, registered by name.

Built-in members come in by the same `register` as any other. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, Field, TypeAdapter, model_validator

from ebdiff.experiment.registry import Registry
from ebdiff.experiment.schema import FEWEST, Name, Positive, Strict

NETWORKS, DATASETS, CODECS = Registry("kind"), Registry("source"), Registry("kind")


class Items(NamedTuple):
    """What is denoised; it belongs to the data, never to the network.

    Attributes:
        shape: of one item: (C, H, W) of an image or a latent, (L, features) of a sequence.
        classes: how many labels there are to condition on, 0: none; as a label, that an item's isn't told.
        variable: whether items are shorter than the first axis L, padded at the end and masked.
    """

    shape: tuple[Annotated[int, Field(gt=0, le=10_000)], ...]
    classes: Annotated[int, Field(ge=0)] = 0
    variable: bool = False

    @property
    def conditional(self) -> bool:
        """Whether a denoiser is told more of an item than its noisy values."""
        return bool(self.classes) or self.variable


ITEMS = TypeAdapter(Items)  # of a file


class NetworkConfig(Strict):
    """What every network says of itself; `kind` names its member."""

    kind: str
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of activations dropped while training.")

    @property
    def title(self) -> str:
        """The network in a few words, for the report."""
        return self.kind

    def check(self, items: Items) -> None:
        """Refuse items that the network can't denoise.

        Raises:
            ValueError: names the key to change.
        """

    def emptied(self, rate: float) -> str | None:
        """A layer of which a pruning rate would leave nothing, in words."""


class Architecture(NamedTuple):
    """What it takes to build a network.

    Attributes:
        config: its section of the experiment.
        items: what it denoises.
    """

    config: NetworkConfig
    items: Items


class ConvolutionalConfig(NetworkConfig):
    """What the U-Nets of images and of latents have in common."""

    width: int = Field(128, ge=4, le=16384, multiple_of=2, description="Channels of the first level.")
    multipliers: tuple[Positive, ...] = Field(
        (1, 2, 2, 2), min_length=1, max_length=12, description="Width of each level / width."
    )
    blocks: int = Field(2, gt=0, le=64, description="Residual blocks per level (decoder: one more).")
    attention: tuple[int, ...] = Field((16,), description="Resolutions with self-attention.")
    norm_groups: int = Field(32, gt=0, description="Groups of every GroupNorm.")

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"width {width} is not a multiple of norm_groups {self.norm_groups}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * m for m in self.multipliers)

    @property
    def shape(self) -> str:
        """Widths in words, for titles."""
        return f"width {self.width}, multipliers {', '.join(map(str, self.multipliers))}"

    def check(self, items: Items) -> None:
        if len(items.shape) != 3:
            raise ValueError(f"network.kind {self.kind}: denoises (C, H, W), not items of {items.shape}")
        side = items.shape[-1]
        if side % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"dataset.image_size: items of {side}x{side} can't be halved "
                f"{len(self.multipliers) - 1} times; use fewer network.multipliers"
            )
        resolutions = [side // 2**level for level in range(len(self.multipliers))]
        if "attention" in self.model_fields_set and (odd := set(self.attention) - set(resolutions)):
            raise ValueError(f"network.attention {sorted(odd)} at none of the resolutions {resolutions}")

    def emptied(self, rate: float) -> str | None:
        for width in (*self.widths, 4 * self.width):
            if (width - int(width * (1 - rate))) // self.norm_groups >= width // self.norm_groups:
                return f"a layer of width {width}"
        return None


class UNetConfig(ConvolutionalConfig):
    """The DDPM U-Net. Defaults are the CIFAR-10 network (35.7 M parameters)."""

    kind: Literal["unet"] = "unet"
    middle_attention: bool = Field(True, description="Self-attention in the middle block.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Share of activations dropped while training.")

    @property
    def title(self) -> str:
        return f"DDPM U-Net, {self.shape}"


class LatentUNetConfig(ConvolutionalConfig):
    """Latent Diffusion's U-Net without conditions. Defaults are LSUN bedroom's and CelebA-HQ's (274 M)."""

    kind: Literal["latent-unet"] = "latent-unet"
    width: int = Field(224, ge=4, le=16384, multiple_of=2, description="Channels of the first level.")
    multipliers: tuple[Positive, ...] = Field(
        (1, 2, 3, 4), min_length=1, max_length=12, description="Width of each level / width."
    )
    attention: tuple[int, ...] = Field((32, 16, 8), description="Resolutions with self-attention.")
    head_dim: int = Field(32, gt=0, description="Channels of an attention head.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        for width in self.widths:
            if width % self.head_dim:
                raise ValueError(f"width {width} is not a multiple of head_dim {self.head_dim}")
        return self

    @property
    def title(self) -> str:
        return f"latent U-Net, {self.shape}"

    def check(self, items: Items) -> None:
        super().check(items)
        if items.classes:
            raise ValueError(f"network.kind {self.kind}: takes no labels; use latent-unet-conditional")


class LatentConditionalConfig(ConvolutionalConfig):
    """Latent Diffusion's U-Net told the class by cross-attention. Defaults are ImageNet's (401 M)."""

    kind: Literal["latent-unet-conditional"] = "latent-unet-conditional"
    width: int = Field(192, ge=4, le=16384, multiple_of=2, description="Channels of the first level.")
    multipliers: tuple[Positive, ...] = Field(
        (1, 2, 3, 5), min_length=1, max_length=12, description="Width of each level / width."
    )
    attention: tuple[int, ...] = Field((32, 16, 8), description="Resolutions with attention.")
    heads: int = Field(1, gt=0, description="Attention heads, of every width.")
    context: int = Field(512, gt=0, description="Size of a class embedding.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        for width in self.widths:
            if width % self.heads:
                raise ValueError(f"width {width} is not a multiple of heads {self.heads}")
        return self

    @property
    def title(self) -> str:
        return f"class-conditional latent U-Net, {self.shape}"

    def check(self, items: Items) -> None:
        super().check(items)
        if not items.classes:
            raise ValueError(f"network.kind {self.kind}: needs labels; use latent-unet for data without")

    def emptied(self, rate: float) -> str | None:
        # Of gated layers, which are four times as wide, (1 - rate)^2 stays.
        gated = 4 * min(self.widths)
        return super().emptied(rate) or (
            None if int(gated * (1 - rate) ** 2) else f"a layer of width {gated}"
        )


class ChiroDiffConfig(NetworkConfig):
    """ChiroDiff's denoiser of drawings. Defaults are the paper's for KanjiVG (416,859 parameters)."""

    kind: Literal["chirodiff"] = "chirodiff"
    body: Literal["gru", "transformer"] = Field(
        "gru", description="What sees the whole drawing: bidirectional GRUs, or attention with four heads."
    )
    hidden: int = Field(96, ge=4, le=16384, multiple_of=4, description="Units of a layer (and direction).")
    layers: int = Field(3, gt=0, le=64)

    @property
    def title(self) -> str:
        return f"ChiroDiff, {self.body} of {self.layers} layers, width {self.hidden}"

    def check(self, items: Items) -> None:
        if len(items.shape) != 2 or items.shape[1] != 3 or not items.variable:
            raise ValueError(
                f"network.kind {self.kind}: denoises drawings (L, 3), not items of {items.shape}"
            )

    def emptied(self, rate: float) -> str | None:
        return None if int(self.hidden * (1 - rate)) else f"a layer of width {self.hidden}"


NETWORKS.register("unet", UNetConfig, "ebdiff.nets.unet:UNet")
NETWORKS.register("latent-unet", LatentUNetConfig, "ebdiff.nets.latent:LatentUNet")
NETWORKS.register("latent-unet-conditional", LatentConditionalConfig, "ebdiff.nets.latent:LatentConditional")
NETWORKS.register("chirodiff", ChiroDiffConfig, "ebdiff.nets.chirodiff:ChiroDiff")


class DatasetConfig(Strict):
    """What every dataset says of itself; `source` names its member.

    Attributes:
        WRITE: what prepares the data: `data.sources.write`, or a function of the same arguments that writes
            those files (uint8 images for metrics, labels, manifest) and, beside them, what it needs more.
            Beside the member, because it may do without torch.
        SEEN: keys that change how training sees the data, not what is prepared.
        DRAWN: whether its images are what the experiment's codec makes of its items.
    """

    WRITE: ClassVar[str | Callable[..., dict]]
    SEEN: ClassVar[frozenset[str]] = frozenset({"subset"})
    DRAWN: ClassVar[bool] = False

    name: Name = Field(description="Folder name under resources/data/.")
    source: str
    path: str | None = Field(
        None,
        description="Local copy: archive, folder, zip or parquet; ${VARIABLES} are filled in, with "
        "${VARIABLE:-default} also where they are unset.",
    )
    subset: int | None = Field(None, ge=FEWEST, description="Train on the first n items only.")

    @property
    def items(self) -> Items:
        """What the data consist of, known before they are prepared."""
        raise NotImplementedError

    @property
    def known_count(self) -> int | None:
        """How many items there are, where that is known before they are prepared."""
        return None

    @property
    def varied(self) -> str | None:
        """The key by which training sees more than the items as they are, which an encoder sees only once."""
        return None

    @property
    def content(self) -> dict[str, Any]:
        """The keys that say what is prepared; where a local copy lies is none of them."""
        return self.model_dump(mode="json", exclude={"path", *self.SEEN})


class ImagesConfig(DatasetConfig):
    """Where the images come from and how training sees them."""

    WRITE = "ebdiff.data.sources:write"
    SEEN = frozenset({"subset", "flip", "classes"})

    source: Literal["bundled-digits", "cifar10", "images"] = Field(
        description="bundled-digits: scikit-learn's 1,797 handwritten digits, 8x8, no download. "
        "cifar10: the official archive, or a local copy of it or of its parquet files at `path`. "
        "images: any folder, zip or parquet of images at `path`, or a dataset of the hub at `hub`."
    )
    image_size: int = Field(32, gt=0, le=4096, description="Height and width of the images, pixels.")
    channels: int = Field(3, ge=1, le=4, description="Colour channels: 1 (grey) or 3.")
    hub: str | None = Field(
        None, pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="Dataset on the Hugging Face hub, owner/name."
    )
    crop: Literal["none", "centre", "celeba"] = Field(
        "none",
        description="Before resizing to image_size. none: images must be square; centre: "
        "largest central square; celeba: 128x128 around row 121, column 89 of an aligned 178x218 image.",
    )
    resize: Literal["bilinear", "bicubic"] = Field(
        "bilinear",
        description="Pillow's filter where images aren't of image_size; it averages when it shrinks. "
        "bilinear: as torchvision resizes, so the public pipelines of CelebA and LSUN; bicubic: sharper.",
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse", description="Images that can't be read: name them and stop, or skip and count them."
    )
    store: Literal["raw", "encoded"] = Field(
        "raw",
        exclude_if=lambda value: value == "raw",  # no part of what other stores depend on
        description="What is kept on disk. raw: pixels; encoded: the source's own JPEG, PNG or WebP bytes "
        "where they are fewer, decoded to the same pixels whenever they are used, by all cores.",
    )
    flip: bool = Field(True, description="Mirror each training image with probability 1/2.")
    classes: int | None = Field(
        None,
        gt=0,
        exclude_if=lambda value: value is None,  # no part of what unconditional networks depend on
        description="How many classes there are, of which the network is told each image's; null: none.",
    )
    labels: Literal["folders"] | None = Field(
        None,
        exclude_if=lambda value: value is None,  # no part of what data without it depend on
        description="folders: an image's class is the last folder of its path, in the order of their names; "
        "null: a parquet column `label`, where there is one.",
    )
    held_out: Annotated[float, Field(ge=0, le=0.5)] | Literal["test"] = Field(
        0.0,
        description="Images that no training sees, for what real images reach against real ones and for the "
        "check of memorisation: a share, of each class where there are labels, or `test`: the source's own "
        "test split (cifar10, parquet files, the hub).",
    )

    @model_validator(mode="after")
    def _place_given(self) -> ImagesConfig:
        if self.source == "images" and not (self.path or self.hub):
            raise ValueError("give `path` (folder, zip or parquet) or `hub` with source images")
        if self.source == "bundled-digits" and self.held_out == "test":
            raise ValueError("held_out: bundled-digits have no test split; give a share, such as 0.2")
        return self

    @property
    def known_count(self) -> int | None:
        known = {"bundled-digits": 1797, "cifar10": 50_000}.get(self.source)
        return known and known - self.kept_out(known)

    def kept_out(self, count: int) -> int:
        """How many of `count` images of the source training doesn't see: rounded as scikit-learn's split."""
        return 0 if self.held_out == "test" else math.ceil(self.held_out * count)

    @property
    def items(self) -> Items:
        return Items((self.channels, self.image_size, self.image_size), self.classes or 0)

    @property
    def varied(self) -> str | None:
        return "flip" if self.flip else None

    @property
    def content(self) -> dict[str, Any]:
        """The keys that say what is prepared: a filter only where an image may have another size."""
        own = {"bundled-digits": 8, "cifar10": 32}.get(self.source)
        return {k: v for k, v in super().content.items() if k != "resize" or self.image_size != own}


for _source in ("bundled-digits", "cifar10", "images"):
    DATASETS.register(_source, ImagesConfig, "ebdiff.data.dataset:Images")


class SketchesConfig(DatasetConfig):
    """Where drawings come from and how their strokes become sequences of points (ChiroDiff, 2304.03785)."""

    WRITE = "ebdiff.data.sketches:write"
    DRAWN = True

    source: Literal["sketches", "quickdraw", "vmnist", "kanjivg"] = Field(
        description="quickdraw: raw .ndjson, a file or a folder of them at `path`, or `categories` to fetch. "
        "vmnist, sketches: a file or a folder of the same kind at `path`. kanjivg: the package of that name, "
        "or the project's SVG archive, packed or not, at `path`."
    )
    categories: tuple[Annotated[str, Field(pattern=r"^\w[\w -]*$")], ...] = Field(
        (), description="Of quickdraw: these alone; all at `path` where none is named."
    )
    per_category: int | None = Field(None, gt=0, description="At most so many drawings of each category.")
    max_points: int = Field(300, gt=1, le=10_000, description="Longer drawings are left out and counted.")
    step: float = Field(
        0.05, ge=0.005, le=1, description="Way between points, as a share of the radius of the drawing."
    )
    simplify: float = Field(
        0.0, ge=0, lt=1, description="Tolerance of Ramer, Douglas and Peucker, as a share of the radius."
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse", description="Drawings that can't be used: name them and stop, or skip and count them."
    )
    held_out: float = Field(0.15, ge=0, le=0.5, description="Share of the drawings that no training sees.")

    @model_validator(mode="after")
    def _place_given(self) -> SketchesConfig:
        if self.source != "kanjivg" and not (self.path or (self.source == "quickdraw" and self.categories)):
            raise ValueError(f"give `path` (.ndjson file or folder of them) with source {self.source}")
        if self.categories and self.source != "quickdraw":
            raise ValueError("categories: quickdraw's alone")
        return self

    @property
    def items(self) -> Items:
        """Sequences of (dx, dy, whether a stroke begins)."""
        return Items((self.max_points, 3), variable=True)


for _source in ("sketches", "quickdraw", "vmnist", "kanjivg"):
    DATASETS.register(_source, SketchesConfig, "ebdiff.data.sketches:Sketches")


class CodecConfig(Strict):
    """What every codec says of itself; `kind` names its member.

    Attributes:
        ENCODED: whether what is denoised is what the codec makes of the data, once (stage `encode-latents`).
        TRAINED: whether it is itself trained on the data (stage `train-first-stage`).
    """

    ENCODED: ClassVar[bool] = False
    TRAINED: ClassVar[bool] = False

    @property
    def folder(self) -> str | None:
        """Where its weights lie, if they come from outside."""
        return None

    kind: str

    def items(self, items: Items) -> Items:
        """What is denoised of the data's items."""
        return items

    def check(self, items: Items) -> None:
        """Refuse items that the codec can't decode.

        Raises:
            ValueError: names the key to change.
        """

    def check_source(self) -> None:
        """Refuse settings that don't say where its weights are; an exported ensemble carries them.

        Raises:
            ValueError: names the keys to give.
        """

    def image_bytes(self, items: Items) -> int:
        """What an image takes, for the plan: a byte for each value of an item, or as a codec knows better."""
        return math.prod(items.shape)


class IdentityConfig(CodecConfig):
    """Items are images, in [-1, 1]."""

    kind: Literal["identity"] = "identity"

    def check(self, items: Items) -> None:
        if len(items.shape) != 3:
            raise ValueError(f"codec.kind identity: items of {items.shape} are no images; name another codec")


class RasterConfig(CodecConfig):
    """Items are drawings. How they are drawn changes every metric, so it stands in each metrics.json."""

    kind: Literal["raster"] = "raster"
    size: int = Field(256, ge=8, le=1024, description="Height and width of the images, pixels.")
    line_width: float = Field(6.0, gt=0, le=64, description="Of 256 pixels, whatever the size.")
    pen: float = Field(0.8, gt=0, lt=1, description="A stroke begins where the pen's value is above this.")

    def check(self, items: Items) -> None:
        if not (items.variable and items.shape[1:] == (3,)):
            raise ValueError(f"codec.kind raster: draws sequences of (dx, dy, pen), not {items.shape}")

    def image_bytes(self, items: Items) -> int:
        return self.size**2


class FirstStageConfig(CodecConfig):
    """An autoencoder (the first stage of latent diffusion, 2112.10752): images become latents and back."""

    ENCODED = True

    channels: int = Field(3, gt=0, le=64, description="Of the latents.")
    factor: int = Field(4, gt=1, le=64, description="Pixels of an image's side for one of its latents'.")

    def check(self, items: Items) -> None:
        if len(items.shape) != 3:
            raise ValueError(f"codec.kind {self.kind}: encodes images (C, H, W), not items of {items.shape}")
        if items.shape[-1] % self.factor:
            raise ValueError(
                f"codec.factor: images of {items.shape[-1]} pixels can't be divided by {self.factor}; "
                "change dataset.image_size"
            )

    def items(self, items: Items) -> Items:
        """Latents (C, H, W) under the images' labels."""
        side = items.shape[-1] // self.factor
        return items._replace(shape=(self.channels, side, side))


class PretrainedConfig(FirstStageConfig):
    """A first stage of diffusers. Defaults are VQ-f4, that of CelebA-HQ, LSUN bedroom and ImageNet 256."""

    kind: Literal["vq", "kl"] = Field(
        description="vq: what the encoder says before quantisation is denoised, `decode` quantises it. "
        "kl: the mean of the posterior is denoised."
    )
    path: str | None = Field(
        None,
        exclude=True,  # where it lies changes no result; what lies there is an input
        description="Local folder with config.json and *.safetensors as diffusers saves them; ${VARIABLES} "
        "are filled in, with ${VARIABLE:-default} also where they are unset.",
    )
    hub: str | None = Field(
        None,
        pattern=r"^\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?$",
        description="On the Hugging Face hub, owner/name or owner/name/folder; where `path` is empty.",
    )
    scale: float = Field(
        1.0, gt=0, description="Latents are multiplied by this (0.18215 with Stable Diffusion's)."
    )

    @property
    def folder(self) -> str | None:
        return self.path

    def check_source(self) -> None:
        if not (self.path or self.hub):
            raise ValueError(
                "codec: give `path` (folder of weights) or `hub` (repository) with kind vq or kl"
            )


class AutoencoderConfig(FirstStageConfig):
    """A small autoencoder of our own, trained on the data by the rule of `codecs/autoencoder.py`."""

    TRAINED = True

    kind: Literal["autoencoder"] = "autoencoder"
    factor: Literal[2, 4, 8, 16] = Field(4, description="Pixels of an image's side for one of its latents'.")


CODECS.register("vq", PretrainedConfig, "ebdiff.codecs.first_stage:VQ")
CODECS.register("kl", PretrainedConfig, "ebdiff.codecs.first_stage:KL")
CODECS.register("autoencoder", AutoencoderConfig, "ebdiff.codecs.autoencoder:SmallAutoencoder")
CODECS.register("identity", IdentityConfig, "ebdiff.codecs.codec:Identity")
CODECS.register("raster", RasterConfig, "ebdiff.codecs.raster:Raster")

# The sections that members fill: who there is, and who is meant where the section doesn't say.
SECTIONS = {"network": (NETWORKS, "unet"), "dataset": (DATASETS, "images"), "codec": (CODECS, "identity")}


def config_of(section: str, raw: Any) -> type[BaseModel]:
    """The type of a section, by the member that its raw mapping names.

    Raises:
        ValueError: no such member.
    """
    registry, usual = SECTIONS[section]
    return registry.config(str(raw.get(registry.what, usual)) if isinstance(raw, dict) else usual)
