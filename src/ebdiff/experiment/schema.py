"""The sections of an experiment file, each a typed model with a description of every key."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

FEWEST = 4  # images; with fewer there is nothing to learn, and nothing to compare
FINAL = "final"  # the reserved search: the finished unpruned network, a history of one
INITIAL = -1  # the interval before the first: the weights before any training step

NAME = r"^[a-z0-9][a-z0-9_-]{0,59}$"  # of a file or folder on any system, and a word in any shell
is_name = re.compile(NAME).fullmatch

T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{', '.join(map(str, values))}: one is repeated")
    return values


Distinct = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_distinct)]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=NAME)]
Seed = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.001, lt=1)]
Span = tuple[int, int]
Criterion = Literal["magnitude", "taylor", "diff-pruning", "random"]
SearchCriterion = Literal["magnitude", "taylor", "diff-pruning"]
GRADIENT = ("taylor", "diff-pruning")  # criteria that need snapshots, images and a backward pass
Weights = Literal["raw", "ema"]
Init = Literal["inherit", "fresh", "dense", "snapshot"]
Law = Literal["uniform", "speed"]
Method = Literal["unpruned", "scratch", "finetune", "eb", "ta-eb", "sparse", "control"]
AFTER_DENSE = ("scratch", "finetune")  # methods that need the finished unpruned network before they begin
Table = Literal[
    "table1", "table2", "table3", "table4", "table5", "table6", "table7", "table8", "table9", "controls",
    "sparse", "steps",
]  # fmt: skip
Protocol = Literal["classifier", "legacy_pytorch", "clean"]


class Strict(BaseModel):
    """Frozen; unknown keys are refused, and infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """To Python true is 1; to whoever writes `iterations: yes` it isn't."""
        values = value if isinstance(value, list | tuple) else [value]
        if cls.model_fields[info.field_name].annotation is not bool and any(
            isinstance(v, bool) for v in values
        ):
            raise ValueError("can't be true or false")
        return value


class Diffusion(Strict):
    """The noise schedule, beta from `beta_start` to `beta_end` over `timesteps`, and the loss."""

    timesteps: int = Field(1000, gt=1, le=10**6, description="T: the number of noise levels.")
    schedule: Literal["linear", "scaled_linear"] = Field(
        "linear", description="What grows linearly: beta, or its root (latent diffusion)."
    )
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    error: Literal["l2", "l1"] = Field("l2", description="Of the predicted noise: squared or absolute.")
    loss: Literal["sum", "mean"] = Field(
        "sum", description="Over an item; mean: per value, of an item of variable length of its own."
    )

    @model_validator(mode="after")
    def _noise_grows(self) -> Diffusion:
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end {self.beta_end} is below beta_start {self.beta_start}")
        return self


class Training(Strict):
    """The optimisation, the same for dense networks and experts."""

    batch: int = Field(128, gt=0, le=10**6, description="Images per step (global batch).")
    learning_rate: float = Field(2e-4, gt=0, description="Adam's rate after warm-up.")
    decay_per_epoch: float = Field(
        1.0,
        gt=0,
        le=1,
        exclude_if=lambda value: value == 1,  # no part of what trainings without it depend on
        description="The rate is multiplied by this after every epoch; 1: constant.",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        exclude_if=lambda value: not value,
        description="Of all weights per step, times the rate (AdamW); 0: Adam.",
    )
    warmup: int = Field(
        0, ge=0, description="Steps of linear warm-up, also of a continued checkpoint; scaled by `scale`."
    )
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null: none.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the weight average.")
    ema_warmup: bool = Field(False, description="Use min(decay, (1+i)/(10+i)) at step i.")
    label_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=lambda value: not value,
        description="Share of labels that the network isn't told, so that it learns what guidance needs.",
    )
    log_every: int = Field(50, gt=0, description="Steps between loss readings (and NaN checks).")
    save_minutes: float = Field(5.0, gt=0, description="Minutes between resumable states.")
    sample_every: int | None = Field(
        None,
        gt=0,
        description="Steps between grids of samples of the same noise, in results/NAME/previews, of networks "
        "that train on all timesteps; null: none.",
    )


class Pruning(Strict):
    """Settings of the gradient criteria."""

    images: int = Field(128, gt=0, description="Fixed batch on which gradients are taken.")
    threshold: float = Field(
        0.05, ge=0, lt=1, description="Diff-Pruning: stop at the first t whose loss < this x max."
    )
    stride: int = Field(1, gt=0, description="Take every n-th timestep; 1 in the paper.")


class Interval(Strict):
    """What separates two masks of a search."""

    unit: Literal["epoch", "pseudo-epoch", "iteration"] = "epoch"
    steps: int | None = Field(None, gt=0, description="Steps per interval; null for an epoch.")

    @model_validator(mode="after")
    def _steps_given(self) -> Interval:
        if (self.unit == "epoch") != (self.steps is None):
            raise ValueError("give `steps` with unit pseudo-epoch or iteration, never with epoch")
        return self


class Search(Strict):
    """A dense training whose masks are watched until they settle (the early-bird rule)."""

    span: Span = Field(None, description="Timesteps trained on, [lo, hi); left out: all.")
    interval: Interval = Field(Interval(), description="epoch, or {unit, steps}.")
    criteria: Distinct[SearchCriterion] = ("magnitude",)
    rates: Distinct[Rate] = Field(description="Asked pruning rates.")
    weights: Distinct[Weights] = Field(("ema",), description="Which weights give tickets.")
    window: int = Field(5, ge=2, description="Masks in the queue (5 in the paper).")
    threshold: float = Field(0.1, gt=0, lt=1, description="Largest distance in the queue (eta).")
    horizon: int = Field(30, gt=0, description="Intervals after which the search gives up.")
    watch: int = Field(0, ge=0, description="Intervals to go on after the last ticket.")
    tickets_at: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_distinct)] = Field(
        (),
        exclude_if=lambda value: not value,  # no part of what the results of searches without it depend on
        description="After how many intervals the weights are kept too, for tickets that experts ask for by "
        "`interval`; 0: before any training. The search goes on to the last of them.",
    )

    @field_validator("interval", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"unit": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _window_fits(self) -> Search:
        if self.horizon < self.window:
            raise ValueError(f"horizon {self.horizon} is shorter than window {self.window}")
        if max(self.tickets_at, default=0) > self.horizon:
            raise ValueError(f"tickets_at {max(self.tickets_at)} lies beyond horizon {self.horizon}")
        return self

    @property
    def gradient_criteria(self) -> tuple[str, ...]:
        """The criteria that need snapshots and a backward pass."""
        return tuple(c for c in self.criteria if c in GRADIENT)


class Dense(Strict):
    """The unpruned network: the search it continues and its length N (the D of the speed-ups)."""

    search: Name = "full"
    iterations: int = Field(gt=0, description="Optimiser steps; scaled by `scale`.")
    source: str | None = Field(
        None,
        min_length=1,
        alias="from",
        description="A public DDPM checkpoint (.safetensors, .ckpt, .pth) to take as the finished unpruned "
        "network instead of training it; `iterations` then says how long it was trained.",
    )


class Speed(Strict):
    """SpeeD's asymmetric timestep law and change-aware weights, for experts with `law: speed`."""

    k: float = Field(5.0, gt=0, description="Timesteps below tau are this many times likelier.")
    lam: float = Field(0.6, ge=0.5, le=1, description="Weights below tau lie in [1 - lam, lam].")
    tau: int = Field(700, gt=0, description="First timestep of the tail.")
    dual: bool = Field(
        True,
        description="Over the whole range, pair t with M - t (M = 642), as SpeeD's code does, which halves "
        "the mass of the tail; false: by quantile, as inside a span, which keeps it.",
    )


class Sampler(Strict):
    """How an image is drawn."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: int = Field(100, gt=0, description="DDIM steps per image; quad spacing visits a few less.")
    spacing: Literal["quad", "uniform"] = Field("quad", description="Which timesteps DDIM visits.")
    clamp: bool = Field(False, description="Clamp x0 to [-1, 1] at each step and recompute eps.")
    strength: float = Field(
        1.0,
        ge=0,
        le=1,
        exclude_if=lambda value: value == 1,  # no part of what samples without it depend on
        description="Of the noise that DDPM adds after each step; 0.75 in ChiroDiff.",
    )
    guidance: float | None = Field(
        None,
        ge=0,
        exclude_if=lambda value: value is None,
        description="w of classifier-free guidance, eps_null + w (eps_class - eps_null), two passes a step; "
        "3.0 in LDM. null: one pass, told the class.",
    )

    @property
    def passes(self) -> int:
        """Through the network for one step."""
        return 1 if self.guidance is None else 2


class Sampling(Sampler):
    """How the images of a run are drawn, and how many."""

    images: int = Field(50_000, ge=FEWEST, le=10**8, description="N: images per run, exactly.")
    batch: int = Field(250, gt=0, le=10**6, description="Images per forward pass.")


class Evaluation(Strict):
    """Which features the distances live in."""

    protocols: Distinct[Protocol] = Field(
        ("classifier",),
        description="The first is the one tables show. classifier: a small network trained on the data's "
        "labels; legacy_pytorch: FID as the paper's script computes it; clean: clean-fid's resizing.",
    )
    weights: str | None = Field(None, min_length=1, description="Inception weights file; null: looked for.")
    batch: int = Field(64, gt=0, le=10**6, description="Images per forward pass of the feature network.")
    reference: int | None = Field(None, ge=FEWEST, description="Real images to compare with; null: all.")
    precision_recall: bool = Field(False, description="Also precision and recall (k = 3).")

    @property
    def reference_count(self) -> str:
        """`reference` as paths spell it: a number or `all`."""
        return str(self.reference or "all")


class Compute(Strict):
    """What one job may use. Results depend on it by rounding only; with dropout, `gpus` and `micro_batch`
    draw other masks."""

    threads: int = Field(
        1, gt=0, le=1024, description="Torch threads per process: of a job, or of each of its GPUs."
    )
    gpus: int = Field(
        0,
        ge=0,
        description="GPUs per training or sampling job, 1 for gradient masks and Inception, none for the "
        "rest; several share its global batch (torchrun), with dropout masks of their own.",
    )
    share: int = Field(
        1,
        gt=0,
        description="Jobs that use one GPU together: by turns, or at once where NVIDIA's MPS runs. Each is "
        "charged its part of the time. Networks are timed on a GPU of their own.",
    )
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="Images whose activations are held at a time, per GPU; null: all. Gradients add up to "
        "the whole batch's: the same to rounding without dropout; with it, its masks are other ones.",
    )
    deterministic: bool = Field(
        False,
        description="On a GPU, only kernels that give the same bits twice; slower. The CPU always does.",
    )
    mem_mb: int = Field(1500, ge=200)
    runtime: int = Field(60, gt=0, description="Minutes a training job may take on a cluster.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:0 ..."
    )

    @model_validator(mode="after")
    def _several(self) -> Compute:
        if self.gpus > 1 and self.device != "auto":
            raise ValueError(f"{self.gpus} `gpus` need `device: auto`; {self.device} is one device")
        if self.share > 1 and (self.gpus, self.device) != (1, "auto"):
            here = f"not `gpus: {self.gpus}` and `device: {self.device}`"
            raise ValueError(f"`share: {self.share}` needs `gpus: 1` and `device: auto`, {here}")
        return self


class Execution(Strict):
    """How a network's arithmetic runs on a device: speed and rounding, never the method."""

    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="fp32: strict. tf32: matrix units of NVIDIA GPUs, 10-bit mantissa. bf16: products and "
        "activations, in sampling all weights; in training norms, masters of the weights, moments and "
        "averages stay fp32.",
    )
    channels_last: bool = Field(False, description="Channels innermost in memory (NHWC).")


class Tuning(Strict):
    """What `ebdiff tune` measured to be fastest, per network: `dense` or an asked rate."""

    device: str = Field("", description="Where it was measured.")
    training: dict[str, Execution] = Field({}, description="Execution of training steps, by network.")
    sampling: dict[str, Execution] = Field({}, description="Execution of sampling, by network.")

    @field_validator("training", "sampling", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """YAML reads the key 0.5 as a number."""
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


class PrimaryClaim(Strict):
    """What an experiment sets out to show of two runs."""

    run: Name
    kind: Literal["lower", "as-good", "comparable", "faster"] = Field(
        "lower",
        description="lower: its distance is; as-good: at most a tenth above; comparable: as good, and "
        "faster as the paper counts time; faster: it takes less device time, search included.",
    )
    against: Name = Field(description="The run that it is compared with, seed by seed.")


PrimaryClaims = Annotated[tuple[PrimaryClaim, ...], Field(max_length=4), AfterValidator(_distinct)]


class Published(Strict):
    """Which of the paper's results this experiment's runs stand beside."""

    dataset: Literal["cifar10", "celeba", "lsun_church", "lsun_bedroom", "imagenet"] = Field(
        "cifar10", description="The paper's dataset, among whose cells a run's `paper` is one."
    )
    note: str = Field("", description="Footnote of tables that show published values.")
