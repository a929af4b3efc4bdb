"""Do two processes with one thread each train faster than one process with two threads?

    python benchmarks/parallel.py

Data parallel over gloo on two cores, the same global batch on both sides; the losses agree. Both take
turns, each time as a fresh process or pair of processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import paired
import torch

from ebdiff.cost.measure import network_of, timing_job
from ebdiff.nets.execution import Runtime
from ebdiff.system import parallel
from ebdiff.training.loop import train
from ebdiff.training.state import State

CPU = torch.device("cpu")
STEPS = 5


def work(stats: Path, tiny: bool) -> None:
    """Some steps of the dense network, in each of the processes; the first writes a line per step."""
    parallel.join(CPU)
    experiment = paired.experiment(16, tiny)
    network = experiment.network.model_copy(update={"dropout": 0.0})  # it would differ by process
    experiment = experiment.model_copy(update={"network": network})
    runtime = Runtime(CPU)
    job = timing_job(experiment, runtime)
    job = replace(job, stats=stats, training=job.training.model_copy(update={"log_every": 1}))
    state = State.start(network_of(experiment, 0.0), runtime)
    train(state, job, 1 + STEPS, save=lambda state: None)


def measured(processes: int, tiny: bool) -> tuple[float, list[float]]:
    """Median seconds of a step after the first, and the losses."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = several if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.jsonl"
        command = [sys.executable, *launcher, __file__, "--work", str(stats), *(["--tiny"] if tiny else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes), "OMP_WAIT_POLICY": "passive"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        lines = [json.loads(line) for line in stats.read_text().splitlines()]
    times = np.diff([line["seconds"] for line in lines])
    return median(times), [line["loss"] for line in lines]


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=5)
    one, two = [], []
    for _ in range(args.rounds):
        for processes, seconds in ((1, one), (2, two)):
            found, losses = measured(processes, args.tiny)
            seconds.append(found)
            if processes == 1:
                expected = losses
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    measure, against = "dense step, two gloo processes of one thread", "one process of two threads"
    paired.write("parallel", [paired.compare(measure, against, "", one, two)], CPU, args.out)


if __name__ == "__main__":
    if "--work" in sys.argv:
        work(Path(sys.argv[sys.argv.index("--work") + 1]), "--tiny" in sys.argv)
    else:
        main()
