"""A made-up results tree for the tests of the report, with numbers simple enough to compute by hand."""

import csv
from copy import deepcopy
from pathlib import Path

import numpy as np

from ebdiff.experiment import layout, load, places, schema
from ebdiff.experiment.records import Records
from ebdiff.report import page, style
from ebdiff.report.results import Results
from ebdiff.system.errors import Missing
from ebdiff.system.files import write_array, write_arrays, write_json, write_text
from ebdiff.tickets.history import History, save_histories

HOSTILE = r"EB <script>alert(1)</script> 50% & $\frac | _x_ {é} 漢"
STEP_MS = {
    "dense": 100.0, "0.3": 70.0, "0.4": 60.0, "0.5": 40.0, "0.55": 39.0, "0.6": 38.0, "0.7": 30.0,
    "0.8": 25.0, "0.9": 22.0,
}  # fmt: skip
MACS = {
    "dense": 30e6, "0.3": 18e6, "0.4": 12e6, "0.5": 7.5e6, "0.55": 7.2e6, "0.6": 7e6, "0.7": 5e6,
    "0.8": 2e6, "0.9": 1e6,
}  # fmt: skip

TRIPLE = [
    {"rate": 0.3, "span": [0, 260], "serve": [0, 240]},
    {"rate": 0.6, "span": [240, 460], "serve": [240, 440]},
    {"rate": 0.8, "span": [440, 1000]},
]
APART = [{"rate": e["rate"], "span": e.get("serve", e["span"])} for e in TRIPLE]
DENSER = [{**TRIPLE[0], "rate": 0.3}, {**TRIPLE[1], "rate": 0.4}, TRIPLE[2]]
LONGER = [{**TRIPLE[0], "iterations": 600}, *TRIPLE[1:]]

RAW = {
    "name": "digits",
    "about": "Made up for a test.",
    "dataset": {
        "name": "digits", "source": "bundled-digits", "flip": False, "image_size": 8, "channels": 1
    },
    "network": {"width": 64, "multipliers": [1, 1], "norm_groups": 8},
    "training": {"batch": 64, "ema_decay": 0.99},
    "searches": {
        "full": {"rates": [0.3, 0.4, 0.5, 0.6, 0.8], "horizon": 24, "tickets_at": [2]},
        "iterwise": {"interval": {"unit": "iteration", "steps": 6}, "rates": [0.5], "horizon": 100},
    },
    "dense": {"iterations": 800},
    "sampling": {"images": 30},
    "published": {"note": "Ours are digits."},
    "runs": {
        "unpruned": {"title": "Unpruned", "method": "unpruned", "init": "dense"},
        "scratch-50": {
            "title": "Scratch", "method": "scratch", "init": "fresh", "rate": 0.5, "iterations": 900,
        },
        "finetune-50": {
            "title": "Finetune", "method": "finetune", "search": "final", "rate": 0.5, "iterations": 100,
        },
        "eb-50": {"title": HOSTILE, "method": "eb", "rate": 0.5, "iterations": 900, "note": "A remark."},
        "random-50": {
            "title": "Random ticket", "method": "control",
            "criterion": "random", "rate": 0.5, "iterations": 900,
        },
        "ta-eb": {"title": "TA-EB", "method": "ta-eb", "iterations": 400, "experts": TRIPLE},
    },
    "tables": {"table4": ["unpruned", "scratch-50", "finetune-50", "eb-50", "random-50", "ta-eb"]},
}  # fmt: skip

MORE = {
    "eb-iter": {"title": "EB iter", "method": "eb", "search": "iterwise", "rate": 0.5, "iterations": 900},
    "apart": {"title": "Apart", "method": "ta-eb", "iterations": 400, "experts": APART},
    "denser": {"title": "30/40/80", "method": "ta-eb", "iterations": 400, "experts": DENSER},
    "longer": {"title": "Longer", "method": "ta-eb", "iterations": 400, "experts": LONGER},
    "narrow": {
        "title": "Narrow", "method": "control", "init": "fresh", "rate": 0.5, "iterations": "like-eb-50",
    },
    "short": {"title": "Short", "method": "control", "init": "dense", "iterations": "like-eb-50"},
    "ta-dense": {
        "title": "TA dense", "method": "control", "init": "snapshot", "iterations": 400, "experts": TRIPLE,
    },
    "at-2": {"title": "At 2", "method": "control", "after": 2, "rate": 0.5, "iterations": 900},
}  # fmt: skip
_SPARSE = {"method": "sparse", "init": "fresh", "iterations": 800}
SPARSE = {
    f"{method}-{name}": {**_SPARSE, "title": f"{method} {name}", "sparse": {"method": method, **settings}}
    for method, moving in (("static", {}), ("rigl", {"interval": 100, "end": 600}))
    for name, settings in (
        ("50", {"sparsity": 0.5, **moving}),
        ("75", {"sparsity": 0.75, **moving}),
        *((("75-gentle", {"sparsity": 0.75, **moving, "fraction": 0.05}),) if moving else ()),
    )
} | {
    "recycle-50": {
        **_SPARSE, "title": "Recycled", "rate": 0.5, "iterations": "like-eb-50",
        "sparse": {"method": "recycle", "interval": 100, "end": 300, "fraction": 0.3},
    },
}  # fmt: skip
CELLS = {
    "unpruned": "unpruned", "scratch-50": "scratch-50", "finetune-50": "magnitude-50",
    "eb-50": "eb-50-magnitude", "ta-eb": "ta-eb", "eb-iter": "eb-50-iterwise", "apart": "ta-eb-plain",
    "denser": "ta-eb-30-40-80", "longer": "ta-eb-200-200-300",
}  # fmt: skip
for name, run in {**RAW["runs"], **MORE}.items():
    run |= {"paper": CELLS[name]} if name in CELLS else {}
ALL_TABLES = {
    **RAW["tables"],
    "table1": ["eb-50", "eb-iter"],
    "table3": ["apart", "ta-eb"],
    "table8": ["denser", "ta-eb"],
    "table9": ["ta-eb", "longer"],
    "controls": ["narrow", "short", "ta-dense", "at-2"],
}

EXECUTION = {
    "precision": "fp32", "channels_last": False, "micro_batch": None, "deterministic": False, "graph": False,
}  # fmt: skip


def make(seeds=(0,), more=False, name="digits", sparse=False):
    raw = deepcopy(RAW)
    raw |= {"seeds": list(seeds), "name": name}
    if more:
        raw["runs"] |= deepcopy(MORE)
        raw["tables"] = ALL_TABLES
    if sparse:
        raw["runs"] |= deepcopy(SPARSE)
        raw["tables"] = {"sparse": ["unpruned", *SPARSE, "eb-50"]}
    return load.parse(raw, "test.yaml")


def fabricate(e, quality=lambda run, seed: 20.0 + seed, settled=True):
    """Write every file that the report of an experiment reads, with simple numbers."""

    def at(template, **parts):
        return layout.path(template, experiment=e.name, dataset=e.dataset.name, **parts)

    rng = np.random.default_rng(0)
    networks = {
        k: {
            "rate": 0.0 if k == "dense" else float(k), "realised": 0.0 if k == "dense" else float(k),
            "params": int(MACS[k] / 30), "macs": int(MACS[k]), "step_ms": STEP_MS[k], "spread_ms": 0.5,
            "operations": 6 * 64 * int(MACS[k]), "bytes": 123_000_000, "bound_ms": 31.4, "bound_by": "bytes",
        }
        for k in MACS
    }  # fmt: skip
    own = {k: sparse(x, networks[x.network]) for k, x in e.sparse().items()}
    write_json(at(layout.COST), {
        "device": "a quiet test machine", "threads": 1, "batch": 64, "torch": "2.13.0",
        "counter": "torch-pruning count_ops_and_params", "networks": networks,
        "peaks": {"flops": {"fp32": 250 * 10**9}, "bytes": 20 * 10**9},
        **({"sparse": own} if own else {}),
    })  # fmt: skip
    write_array(at(layout.IMAGES), rng.integers(0, 256, (100, 8, 8, 1), np.uint8))
    if e.codec.ENCODED:
        write_json(at(layout.RECONSTRUCTION), {
            "trained_here": e.codec.TRAINED, "share": 0.25, "rmse": 10.9, "held_out_rmse": None,
            "protocols": {name: {"fd": 0.02} for name in e.evaluation.protocols},
        })  # fmt: skip
    write_json(at(layout.MANIFEST), {
        "title": "Optical digits", "origin": "scikit-learn", "licence": "CC BY 4.0",
        "count": 100, "shape": [8, 8, 1],
    })  # fmt: skip
    for name, run in e.runs.items():
        for seed in e.seeds_of(name):
            protocols = e.evaluation.protocols
            write_json(
                at(layout.METRICS, run=name, seed=seed), metrics(quality(name, seed), name, seed, protocols)
            )
            samples = at(layout.SAMPLES, run=name, seed=seed)
            write_array(samples, rng.integers(0, 256, (30, 8, 8, 1), np.uint8))
            drawn = {"device": "a quiet test machine", "world": 1}
            drawn["execution"] = {x.network: EXECUTION for x in run.experts}
            write_json(at(layout.SAMPLE_LEDGER, run=name, seed=seed), drawn)
            for x in run.experts:
                steps = x.iterations if isinstance(x.iterations, int) else 500 + seed
                parts = {"seed": seed, "expert": x.key, "milestone": str(x.iterations)}
                moved = [[step, 1 - step / 1000, 0.75] for step in range(100, 601, 100)]
                told = {"sparse": {"overlap": moved}} if x.sparse and x.sparse.method == "rigl" else {}
                write_json(at(layout.LEDGER, **parts), {**ledger(steps), **told})
                lines = [
                    f'{{"step": {i}, "loss": {900 / (i + 9)}, "seconds": 1}}'
                    for i in range(0, steps, max(50, steps // 20))
                ]
                write_text(at(layout.STATS, **parts), "\n".join(lines) + "\n")
                if x.needs_ticket:
                    ticket = {k: getattr(x, k) for k in ("search", "criterion", "weights", "rate")}
                    told = story(e, ticket, seed, settled)
                    if x.after is not None:
                        asked = {"interval": x.after - 1, "intervals_completed": x.after}
                        told |= {**asked, "settled": None, "step": 29 * x.after}
                    write_json(places.ticket_of(e, x, layout.STORY, seed), told)
                    kind = {k: ticket[k] for k in ("search", "criterion", "weights")}
                    for path in places.masks_beside(e, seed, **kind):
                        save_histories(path, {x.weights: history(e, path.parts[-4], seed)})
            for path in places.mask_ledgers(e, run.experts, seed):  # two seconds an interval
                intervals = 1 if (search := path.parts[-4]) == schema.FINAL else 24
                write_json(path, {"seconds": 2.0 * intervals, "masks": intervals * len(e.rates_of(search))})
    for seed in {*e.seeds, *(seed for name in e.runs for seed in e.seeds_of(name))}:
        for search, s in e.searches.items():
            write_json(at(layout.DENSE_LEDGER, seed=seed, search=search), {
                **ledger(696), "intervals": 24, "stopped": "settled", "horizon": s.horizon,
            })  # fmt: skip
            for weights in ("raw", "ema"):
                parts = {"seed": seed, "search": search, "criterion": "magnitude", "weights": weights}
                write_arrays(at(layout.HAMMING, **parts), **hamming(s.rates, s.interval.unit))


def sparse(expert, dense):
    """What a sparse network costs: masks take a tenth more time; four in five of its weights are masked."""
    left = 1 - 0.8 * expert.sparse.zeros
    return {
        "network": expert.network, "method": expert.sparse.method, "sparsity": expert.sparse.zeros,
        "rate": dense["rate"], "realised": dense["realised"],
        "params": round(left * dense["params"]), "macs": round(left * dense["macs"]),
        "training_flops": 6 * left * dense["macs"], "step_ms": 1.1 * dense["step_ms"], "spread_ms": 0.5,
    }  # fmt: skip


def ledger(steps):
    process = {
        "started": "2026-01-02T03:04:05", "device": "a quiet test machine", "world": 2,
        "execution": EXECUTION, "seconds": steps / 10, "steps": steps,
    }  # fmt: skip
    return {
        "steps": steps, "seconds": steps / 10, "device_seconds": steps / 5, "images": 64 * steps,
        "peak_mb": 300.0,
        "device": "a quiet test machine", "threads": 1, "processes": [process],
        "versions": {"ebdiff": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def metrics(fd, run, seed, protocols=("classifier",)):
    """As `fid` writes them; of the classifier where its protocol is among them."""
    number = {
        "fd": fd, "kid": fd / 100, "ill_conditioned": False, "images": 30, "reference_images": 100,
        "floor": {"fd": 1.9, "kid": 0.0, "images": 20, "draws": 3, "held_out": True},
        "at_floor": {"fd": fd + 1, "kid": fd / 50, "images": 20, "draws": 3, "held_out": True},
        "ceiling": {"fd": 561.0, "kid": 3.0, "images": 100},
        "memorisation": {
            "images": 20, "nearest": 1.5, "held_out_nearest": 1.0, "bound": 0.05, "nearer": 0.02,
        },
    }  # fmt: skip
    measured = {
        **number, "precision": 0.6, "recall": 0.5, "split": "all train images", "mode": "bilinear",
        "device": "a test machine", "weights_sha256": "7ff4a85c3a6378f0dfc8433ffd789663",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    looks = {
        "confident": 0.9, "real_confident": 0.95, "class_shares": [0.1] * 10, "classifier_accuracy": 0.992,
    }  # fmt: skip
    return {
        "protocol": protocols[0], "run": run, "seed": seed, **number,
        "protocols": {name: {"protocol": name, **measured} for name in protocols},
        **(looks if "classifier" in protocols else {}),
    }  # fmt: skip


def story(e, ticket, seed, settled):
    final = ticket["search"] == schema.FINAL
    unit = "epoch" if final else e.searches[ticket["search"]].interval.unit
    interval = 0 if final else 8 + seed
    steps = 6 if unit == "iteration" else 29
    return {
        **ticket, "realised": ticket["rate"], "settled": settled or final, "interval": interval,
        "intervals_completed": interval + 1, "unit": unit, "interval_steps": steps,
        "step": (interval + 1) * steps, "window": 5, "threshold": 0.1, "last_distances": [0.2, 0.15],
        "to_initial": None if final else 0.45, "to_last": 0.1, "chance": 0.5, "kind": "learned",
        "params": 1, "macs": 1, "widths": {}, "seed": seed,
    }  # fmt: skip


def history(e, search, seed):
    """Masks of 40 entries: the ticket's is 5 entries, of seed 1 on 3, from the finished network's."""
    rates = tuple(e.rates_of(search))
    mask = np.arange(40) < 20
    mask[: (0 if search == schema.FINAL else 3 if seed else 5)] = False
    masks = np.packbits(np.stack([mask] * len(rates)), axis=1)
    far = np.zeros_like(masks)  # every mask but a ticket's own
    others = 0 if search == schema.FINAL else 20
    found = [far] * others + [masks]
    found.insert(min(8 + seed, others), found.pop())
    return History(rates, ("a", "b"), (20, 20), far, found)


def hamming(rates, unit, n=14):
    age = np.arange(n)
    one = np.abs(age[:, None] - age) * 0.2 / (1 + np.minimum(age[:, None], age))
    matrix = np.clip(np.stack([one] * len(rates)), 0, 0.5).astype(np.float32)
    return {
        "rates": np.array(rates), "intervals": age, "matrix": matrix,
        "initial": np.tile(0.5 * (1 - np.exp(-age / 2)), (len(rates), 1)),
        "chance": np.full(len(rates), 0.5), "window": np.array(5), "threshold": np.array(0.1),
        "interval_steps": np.array(29), "unit": np.array(unit),
    }  # fmt: skip


def write(e, *what, folder=Path("out"), partial=False):
    """Some tables and figures of what is there: their paths."""
    return page.write(Results(e, partial=partial), what, folder)


def vouched(monkeypatch):
    """Made-up files have no records: it is enough that they are there."""

    def check(records, path):
        if not path.exists():
            raise Missing(path)

    monkeypatch.setattr(Records, "check", check)


def rows_of(path):
    """The rows of a csv."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def undrawn(monkeypatch):
    """Pages without the seconds of drawing: every figure is a sentence."""
    dot = style.save(style.sentence("a figure"), Path(), "dot")[1].read_bytes()
    monkeypatch.setattr(page, "_draw", lambda *_: [])
    monkeypatch.setattr(Results, "png", lambda *_: dot)
