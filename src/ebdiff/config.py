"""The typed experiment: one YAML file, checked whole before anything starts.

An experiment names a dataset, a network, how to train it, the *searches* that look for
early-bird tickets, and the *runs*: lists of experts that together cover every timestep.
This module imports no torch, because the Snakefile reads it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ebdiff.errors import unknown

FINAL = "final"  # the reserved search: the finished unpruned network, a history of one

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
Seed = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Span = tuple[int, int]
Criterion = Literal["magnitude", "taylor", "diff-pruning", "random"]
SearchCriterion = Literal["magnitude", "taylor", "diff-pruning"]
Weights = Literal["raw", "ema"]
Init = Literal["inherit", "fresh", "dense", "snapshot"]
Law = Literal["uniform", "speed"]
Method = Literal["unpruned", "scratch", "finetune", "eb", "ta-eb", "control"]
Table = Literal[
    "table1", "table2", "table3", "table4", "table5", "table6", "table7", "table8", "table9", "controls"
]
Protocol = Literal["classifier", "legacy_pytorch", "clean"]


class Strict(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(Strict):
    """Where the images come from and how training sees them."""

    name: Name = Field(description="Folder name under resources/data/.")
    source: Literal["bundled-digits", "cifar10", "images"] = Field(
        description="bundled-digits: scikit-learn's 1,797 handwritten digits, 8x8, no download. "
        "cifar10: the official archive, or a local copy of it or of its parquet files at `path`. "
        "images: any folder, zip or parquet of images at `path`, or a dataset of the hub at `hub`."
    )
    path: str | None = Field(
        None,
        description="Local copy: archive, folder, zip or parquet; ${VARIABLES} are filled in, with "
        "${VARIABLE:-default} also where they are unset.",
    )
    hub: str | None = Field(None, description="Dataset on the Hugging Face hub, owner/name.")
    crop: Literal["none", "centre", "celeba"] = Field(
        "none",
        description="Before resizing to the network's size. none: images must be square; centre: "
        "largest central square; celeba: 128x128 around row 121, column 89 of an aligned 178x218 image.",
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse", description="Images that can't be read: name them and stop, or skip and count them."
    )
    flip: bool = Field(True, description="Mirror each training image with probability 1/2.")
    subset: int | None = Field(None, gt=0, description="Train on the first n images only.")


class Network(Strict):
    """The DDPM U-Net. Defaults are the CIFAR-10 network (35.7 M parameters)."""

    image_size: int = Field(32, gt=0, description="Height and width of the images, pixels.")
    channels: int = Field(3, ge=1, le=4, description="Colour channels.")
    width: int = Field(128, ge=4, multiple_of=2, description="Channels of the first level.")
    multipliers: tuple[int, ...] = Field(
        (1, 2, 2, 2), min_length=1, description="Width of each level / width."
    )
    blocks: int = Field(2, gt=0, description="Residual blocks per level (decoder: one more).")
    attention: tuple[int, ...] = Field((16,), description="Resolutions with self-attention.")
    middle_attention: bool = Field(True, description="Self-attention in the middle block.")
    dropout: float = Field(0.1, ge=0, lt=1)
    norm_groups: int = Field(32, gt=0, description="Groups of every GroupNorm.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Network:
        if self.image_size % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"image_size {self.image_size} can't be halved {len(self.multipliers) - 1} times; "
                "use fewer multipliers"
            )
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"width {width} is not a multiple of norm_groups {self.norm_groups}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * m for m in self.multipliers)


class Diffusion(Strict):
    """The noise schedule: beta linear from `beta_start` to `beta_end` over `timesteps`."""

    timesteps: int = Field(1000, gt=1, description="T: the number of noise levels.")
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)


class Training(Strict):
    """The optimisation, the same for dense networks and experts."""

    batch: int = Field(128, gt=0, description="Images per step (global batch).")
    learning_rate: float = Field(2e-4, gt=0, description="Adam's rate, constant after warm-up.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up; scaled by `scale`.")
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null: none.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the weight average.")
    ema_warmup: bool = Field(False, description="Use min(decay, (1+i)/(10+i)) at step i.")
    log_every: int = Field(50, gt=0, description="Steps between loss readings (and NaN checks).")
    save_minutes: float = Field(5.0, gt=0, description="Minutes between resumable states.")


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
    criteria: tuple[SearchCriterion, ...] = Field(("magnitude",), min_length=1)
    rates: tuple[Rate, ...] = Field(min_length=1, description="Asked pruning rates.")
    weights: tuple[Weights, ...] = Field(("ema",), min_length=1, description="Which weights give tickets.")
    window: int = Field(5, ge=2, description="Masks in the queue (5 in the paper).")
    threshold: float = Field(0.1, gt=0, lt=1, description="Largest distance in the queue (eta).")
    horizon: int = Field(30, gt=0, description="Intervals after which the search gives up.")
    watch: int = Field(0, ge=0, description="Intervals to go on after the last ticket.")

    @field_validator("interval", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"unit": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _window_fits(self) -> Search:
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates {list(self.rates)} repeat one")
        if self.horizon < self.window:
            raise ValueError(f"horizon {self.horizon} is shorter than window {self.window}")
        return self

    @property
    def gradient_criteria(self) -> tuple[str, ...]:
        """The criteria that need snapshots and a backward pass."""
        return tuple(c for c in self.criteria if c in ("taylor", "diff-pruning"))


class Dense(Strict):
    """The unpruned network: the search it continues and its length N (the D of the speed-ups)."""

    search: Name = "full"
    iterations: int = Field(gt=0, description="Optimiser steps; scaled by `scale`.")
    source: str | None = Field(
        None,
        alias="from",
        description="A public DDPM checkpoint (.safetensors, .ckpt, .pth) to take as the finished unpruned "
        "network instead of training it; `iterations` then says how long it was trained.",
    )


class Speed(Strict):
    """SpeeD's asymmetric timestep law and change-aware weights, for experts with `law: speed`."""

    k: float = Field(5.0, gt=0, description="Timesteps below tau are this many times likelier.")
    lam: float = Field(0.6, ge=0.5, le=1, description="Weights below tau lie in [1 - lam, lam].")
    tau: int = Field(700, gt=0, description="First timestep of the tail.")
    dual: bool = Field(True, description="Over the whole range, pair t with M - t (M = 642).")


class Expert(Strict):
    """A network trained on a span of timesteps and serving one."""

    init: Init = Field(
        "inherit",
        description="inherit: a ticket's weights; fresh: new weights of the same widths; "
        "dense: the unpruned network; snapshot: the ticket's weights before surgery.",
    )
    search: Name = Field("full", description="The ticket's search, or `final`.")
    criterion: Criterion = "magnitude"
    weights: Weights = "ema"
    rate: Rate | None = Field(None, description="Asked pruning rate; none for `dense`.")
    law: Law = Field("uniform", description="Timesteps: uniform in antithetic pairs, or SpeeD.")
    span: Span = Field(None, description="Timesteps trained on, [lo, hi); left out: all.")
    serve: Span = Field(None, description="Timesteps served; left out: the span.")
    iterations: int | str = Field(description="Optimiser steps, or like-RUN (equal device time).")

    @field_validator("iterations")
    @classmethod
    def _milestone(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError("iterations must be positive")
        if isinstance(value, str) and not value.startswith("like-"):
            raise ValueError(f"iterations must be a number or like-RUN, not {value!r}")
        return value

    @model_validator(mode="after")
    def _rate_given(self) -> Expert:
        if (self.init == "dense") != (self.rate is None):
            raise ValueError("give a rate to every expert except `init: dense`, which has none")
        return self

    @property
    def key(self) -> str:
        """The expert's name: runs that list the same expert share it."""
        span = f"t{self.span[0]}-{self.span[1]}"
        law = "" if self.law == "uniform" else f"-{self.law}"
        if self.init == "dense":
            return f"dense-{self.search}{law}"
        if self.init == "fresh":
            return f"fresh-{self.rate}-{span}{law}"
        prefix = "snapshot-" if self.init == "snapshot" else ""
        return f"{prefix}{self.search}-{self.criterion}-{self.weights}-{self.rate}-{span}{law}"

    @property
    def continues_search(self) -> bool:
        """Whether this is the unpruned network that goes on where its search stopped."""
        return self.init == "dense" and self.law == "uniform"

    @property
    def needs_ticket(self) -> bool:
        """Whether the expert starts from a ticket's file (inherit) or story (snapshot)."""
        return self.init in ("inherit", "snapshot")


class Run(Strict):
    """A list of experts whose serve-spans tile [0, T): one row of a table.

    Keys of an expert written on the run itself are defaults for all its experts.
    """

    title: str = Field(min_length=1, description="How tables and figures call it.")
    method: Method = Field(description="Which accounting rule holds (A6) and which block it is in.")
    seeds: tuple[Seed, ...] | None = Field(None, min_length=1, description="Seeds; null: the experiment's.")
    note: str | None = Field(None, description="Footnote wherever the run appears.")
    experts: tuple[Expert, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spread_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        shared = {k: raw[k] for k in raw if k in Expert.model_fields}
        rest = {k: raw[k] for k in raw if k not in Expert.model_fields}
        experts = rest.get("experts", [{}])
        if isinstance(experts, list | tuple) and all(isinstance(e, dict) for e in experts):
            rest["experts"] = [{**shared, **e} for e in experts]
        return rest


class Sampling(Strict):
    """How images are drawn."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: int = Field(100, gt=0, description="DDIM steps per image; quad spacing visits a few less.")
    spacing: Literal["quad", "uniform"] = Field("quad", description="Which timesteps DDIM visits.")
    clamp: bool = Field(False, description="Clamp x0 to [-1, 1] at each step and recompute eps.")
    images: int = Field(50_000, gt=0, description="N: images per run, exactly.")
    batch: int = Field(250, gt=0, description="Images per forward pass.")


class Evaluation(Strict):
    """Which features the distances live in."""

    protocols: tuple[Protocol, ...] = Field(
        ("classifier",),
        min_length=1,
        description="The first is the one tables show. classifier: a small network trained on the data's "
        "labels; legacy_pytorch: FID as the paper's script computes it; clean: clean-fid's resizing.",
    )
    weights: str | None = Field(None, description="Inception weights file; null: looked for.")
    batch: int = Field(64, gt=0, description="Images per forward pass of the feature network.")
    reference: int | None = Field(None, gt=1, description="Real images to compare with; null: all.")
    precision_recall: bool = Field(False, description="Also precision and recall (k = 3).")

    @property
    def reference_count(self) -> str:
        """`reference` as paths spell it: a number or `all`."""
        return str(self.reference or "all")


class Compute(Strict):
    """What one training or sampling job may use; only `measure-cost` depends on it."""

    threads: int = Field(1, gt=0, description="Torch threads per job.")
    gpus: int = Field(0, ge=0, description="GPUs per job.")
    mem_mb: int = Field(1500, ge=200)
    runtime: int = Field(60, gt=0, description="Minutes a training job may take on a cluster.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")


class Published(Strict):
    """How this experiment's runs map to the paper's rows."""

    dataset: Literal["cifar10", "celeba", "lsun_church", "lsun_bedroom"] = "cifar10"
    expert_iterations: dict[int, int] = Field(
        {}, description="Our iterations -> the paper's, for Tables 3, 8 and 9."
    )
    note: str = Field("", description="Footnote of tables that show published values.")


class Experiment(Strict):
    """Everything a run of the workflow needs to know."""

    name: Name
    about: str = Field("", description="One sentence, shown on top of the report.")
    scale: float = Field(1.0, gt=0, description="Multiplies iterations, pseudo-epochs, warm-up.")
    dataset: Dataset
    network: Network
    diffusion: Diffusion = Diffusion()
    training: Training
    pruning: Pruning = Pruning()
    searches: dict[Name, Search]
    dense: Dense
    sampling: Sampling
    evaluation: Evaluation = Evaluation()
    speed: Speed = Speed()
    compute: Compute = Compute()
    published: Published = Published()
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    runs: dict[Name, Run] = Field(min_length=1)
    tables: dict[Table, tuple[Name, ...]] = Field({}, description="Rows of each table, in order.")

    @model_validator(mode="before")
    @classmethod
    def _fill_spans(cls, raw: Any) -> Any:
        """Write the full range where a span is left out, and the span where `serve` is."""
        try:
            full = [0, raw.get("diffusion", {}).get("timesteps", 1000)]
            for search in raw.get("searches", {}).values():
                if search.get("span") is None:
                    search["span"] = full
            for run in raw.get("runs", {}).values():
                if run.get("span") is None:
                    run["span"] = full
                for expert in run.get("experts", [run]):
                    if expert.get("init", run.get("init")) == "dense":
                        expert.setdefault("search", raw["dense"].get("search", "full"))
                        expert.setdefault("iterations", run.get("iterations", raw["dense"]["iterations"]))
                    if expert.get("span") is None:
                        expert["span"] = run["span"]
                    if expert.get("serve") is None:
                        expert["serve"] = run.get("serve") or expert["span"]
        except (AttributeError, KeyError, TypeError):
            pass  # a malformed file: the typed checks below name the key
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if FINAL in self.searches:
            raise ValueError(f"searches.{FINAL} is reserved for the finished unpruned network")
        for name, search in self.searches.items():
            self._check_span(f"searches.{name}.span", search.span)
            for rate in search.rates:
                self._check_rate(f"searches.{name}.rates", rate)
        if self.dense.search not in self.searches:
            raise ValueError(f"dense.search: {unknown(self.dense.search, self.searches)}")
        if self.searches[self.dense.search].span != (0, self.diffusion.timesteps):
            raise ValueError(f"dense.search: {self.dense.search!r} doesn't span all timesteps")
        for name, run in self.runs.items():
            self._check_run(name, run)
        for table, names in self.tables.items():
            for name in names:
                if name not in self.runs:
                    raise ValueError(f"tables.{table}: {unknown(name, self.runs)}")
        return self

    def _check_span(self, where: str, span: Span) -> None:
        lo, hi = span
        if not 0 <= lo < hi <= self.diffusion.timesteps:
            raise ValueError(
                f"{where}: [{lo}, {hi}) is not inside [0, {self.diffusion.timesteps}); "
                "spans are half-open, low end first"
            )

    def _check_rate(self, where: str, rate: float) -> None:
        network = self.network
        for width in (*network.widths, 4 * network.width):
            if (width - int(width * (1 - rate))) // network.norm_groups >= width // network.norm_groups:
                raise ValueError(f"{where}: rate {rate} leaves no channel of a layer of width {width}")

    def _check_run(self, name: str, run: Run) -> None:
        for i, expert in enumerate(run.experts):
            where = f"runs.{name}.experts[{i}]" if len(run.experts) > 1 else f"runs.{name}"
            self._check_span(f"{where}.span", expert.span)
            self._check_span(f"{where}.serve", expert.serve)
            if not (expert.span[0] <= expert.serve[0] and expert.serve[1] <= expert.span[1]):
                raise ValueError(f"{where}.serve: {expert.serve} lies outside the span {expert.span}")
            if expert.rate is not None:
                self._check_rate(f"{where}.rate", expert.rate)
            self._check_origin(where, expert)
            self._check_method(where, run.method, expert)
            if isinstance(expert.iterations, str):
                self._check_like(where, expert.iterations.removeprefix("like-"))
        edges = 0
        for lo, hi in sorted(e.serve for e in run.experts):
            if lo != edges:
                kind = "no expert serves" if lo > edges else "two experts serve"
                raise ValueError(
                    f"runs.{name}: {kind} timesteps [{min(lo, edges)}, {max(lo, edges)}); "
                    "serve-spans must tile all timesteps"
                )
            edges = hi
        if edges != self.diffusion.timesteps:
            raise ValueError(f"runs.{name}: no expert serves timesteps [{edges}, {self.diffusion.timesteps})")

    def _check_origin(self, where: str, expert: Expert) -> None:
        """The ticket an expert starts from must be one that its search looks for."""
        if expert.init == "dense" and expert.search != self.dense.search:
            raise ValueError(f"{where}.search: the unpruned network continues {self.dense.search!r}")
        if expert.init == "dense" and expert.span != (0, self.diffusion.timesteps):
            raise ValueError(f"{where}.span: the unpruned network trains on all timesteps")
        if not expert.needs_ticket:
            return
        if expert.search == FINAL:
            if self.final_expert is None:
                raise ValueError(f"{where}.search: `final` needs a run with `init: dense`")
            return
        if expert.search not in self.searches:
            raise ValueError(f"{where}.search: {unknown(expert.search, [*self.searches, FINAL])}")
        search = self.searches[expert.search]
        asked = "magnitude" if expert.criterion == "random" else expert.criterion
        for key, value, offered in (
            ("criterion", asked, search.criteria),
            ("rate", expert.rate, search.rates),
            ("weights", expert.weights, search.weights),
        ):
            if value not in offered:
                raise ValueError(
                    f"{where}.{key}: search {expert.search!r} looks for "
                    f"{', '.join(map(str, offered))}, not {value}; add it there"
                )

    def _check_method(self, where: str, method: str, expert: Expert) -> None:
        """A method's accounting must fit what the expert is."""
        fits = {
            "unpruned": (expert.init == "dense", "init: dense"),
            "scratch": (expert.init == "fresh", "init: fresh"),
            "finetune": (expert.init == "inherit" and expert.search == FINAL, f"a ticket of search {FINAL}"),
            "eb": (expert.init == "inherit" and expert.search != FINAL, "a ticket of a search"),
            "ta-eb": (expert.init == "inherit" and expert.search != FINAL, "tickets of searches"),
        }
        fit, wanted = fits.get(method, (True, ""))
        if not fit:
            raise ValueError(f"{where}: method {method} means {wanted}; method control fits anything")

    def _check_like(self, where: str, other: str) -> None:
        if other not in self.runs:
            raise ValueError(f"{where}.iterations: {unknown(other, self.runs)}")
        if any(isinstance(e.iterations, str) for e in self.runs[other].experts):
            raise ValueError(f"{where}.iterations: like-{other} refers to a run that is itself like one")

    @property
    def final_expert(self) -> Expert | None:
        """The unpruned network at N steps, from which `final` tickets are cut."""
        for run in self.runs.values():
            for expert in run.experts:
                if expert.continues_search and expert.iterations == self.dense.iterations:
                    return expert
        return None

    def experts(self) -> dict[str, Expert]:
        """Every distinct expert by its key (serve-span and milestone aside)."""
        return {e.key: e for run in self.runs.values() for e in run.experts}

    def milestones(self, key: str) -> list[int]:
        """The counted milestones of an expert over all runs, ascending."""
        found = {e.iterations for run in self.runs.values() for e in run.experts if e.key == key}
        if self.final_expert is not None and self.final_expert.key == key:
            found.add(self.dense.iterations)
        return sorted(m for m in found if isinstance(m, int))

    def all_milestones(self, key: str) -> list[int | str]:
        """Counted milestones, then the `like-RUN` ones."""
        experts = (e for run in self.runs.values() for e in run.experts if e.key == key)
        likes = {e.iterations for e in experts if isinstance(e.iterations, str)}
        return [*self.milestones(key), *sorted(likes)]

    def previous_milestone(self, key: str, milestone: str) -> int | None:
        """The milestone that the asked one continues, if any (`like-` ones continue none)."""
        if milestone.startswith("like-"):
            return None
        return max((m for m in self.milestones(key) if m < int(milestone)), default=None)

    def seeds_of(self, run: str) -> tuple[int, ...]:
        """The seeds of a run: its own, or the experiment's."""
        return self.runs[run].seeds or self.seeds

    def rates_of(self, search: str) -> list[float]:
        """The rates at which a search takes masks; for `final`, those that some run asks of it."""
        if search != FINAL:
            return list(self.searches[search].rates)
        return sorted({e.rate for e in self.experts().values() if e.needs_ticket and e.search == FINAL})

    def rates(self) -> list[float]:
        """Every rate that some expert uses, ascending."""
        return sorted({e.rate for e in self.experts().values() if e.rate is not None})

    def epoch_steps(self, count: int) -> int:
        """Steps per epoch for a dataset of `count` images: ceil(N / batch), every batch full."""
        return math.ceil(min(count, self.dataset.subset or count) / self.training.batch)
