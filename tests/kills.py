"""Kill what runs, at any moment, and compare what is left with an undisturbed run's files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import safe_open

# Keys of JSON and columns of tables that hold times, dates or memory, or hashes of files that do. They may
# differ, nothing else.
TIMES = re.compile(
    r"(\w*seconds|started|processes|peak_mb|peaks|images_per_second|step_ms|spread_ms|bound_|speedup(?!_macs)).*"
    "|inputs|checksum|stats_sha256"
)
ASIDE = {
    "logs",
    "benchmarks",
    "records",
    ".snakemake",
    ".snakemake_timestamp",
}  # nothing is computed from these
BIN = Path(sys.executable).parent


# --- comparing ----------------------------------------------------------------------------------------------


def timeless(value):
    """JSON without whatever holds times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMES.fullmatch(k)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def bits(array):
    return array.dtype.str, array.shape, array.tobytes()


def read_safetensors(path):
    with safe_open(path, framework="np") as file:
        story = {k: timeless(json.loads(v)) for k, v in file.metadata().items()}
        return story, {name: bits(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: bits(file[name]) for name in file.files}


def read_csv(path):
    return pd.read_csv(path).filter(regex=f"^(?!({TIMES.pattern})$)").to_csv()


def read_png(path):
    """The pixels; of a figure, which may show times, only that it can be read."""
    pixels = np.asarray(Image.open(path))
    return bits(pixels) if path.stem == "samples" else pixels.ndim


def read_text(path):
    """A shown table without its numbers, and without the width that they give to columns."""
    return re.sub(r"\d[\d.,]*", "#", re.sub(r"(?<=[ -])[ -]+", "", path.read_text(encoding="utf-8")))


READ = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".npy": lambda path: bits(np.load(path, allow_pickle=False)),
    ".json": lambda path: timeless(json.loads(path.read_text())),
    ".jsonl": lambda path: [timeless(json.loads(line)) for line in path.read_text().splitlines()],
    ".csv": read_csv,
    ".md": read_text,
    ".tex": read_text,
    ".png": read_png,
    ".pdf": lambda path: path.read_bytes().rstrip().endswith(b"%%EOF"),
    ".yaml": lambda path: path.read_text(encoding="utf-8"),
    ".html": lambda path: path.read_text(encoding="utf-8").rstrip().endswith("</html>"),
}


def unfinished(path):
    """Whether a path is one of those that a kill may leave: resumable state, a hidden temporary."""
    return any(part == "state" or part.startswith(".") for part in path.parts)


def walk(folder):
    """Relative paths of all files and folders that verbs write, also while they change."""
    found = []
    for top in ("results", "resources", "config"):
        for place, folders, names in os.walk(folder / top):
            found += [Path(place, name).relative_to(folder) for name in folders + names]
    return [path for path in found if not ASIDE & set(path.parts)]


def products(folder):
    """All files that something is computed from, by relative path."""
    return {path for path in walk(folder) if not (folder / path).is_dir()}


def leftovers(folder):
    """State, locks and temporaries, empty folders too."""
    return sorted(str(path) for path in walk(folder) if unfinished(path))


def wrong(folder, calm):
    """What bears a final name in `folder` and isn't, bit for bit or but for times, what `calm` has there."""
    found = {p for p in products(folder) if not unfinished(p)}
    bad = [f"{p}: not there undisturbed" for p in sorted(found - products(calm))]
    for snapshots in {p.parent for p in found if p.parent.name == "snapshots"}:  # one output, all or nothing
        there = {p for p in products(calm) if p.parent == snapshots}
        bad += [f"{p}: missing" for p in sorted(there - found)]
    for path in sorted(found & products(calm)):
        if READ[path.suffix](folder / path) != READ[path.suffix](calm / path):
            bad.append(f"{path}: differs")
    return bad


# --- killing ------------------------------------------------------------------------------------------------


def start(folder, *command):
    """Start a command in its own session; what it says goes to `out.txt`."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with (folder / "out.txt").open("w") as out:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell ignores it for what it starts in the background, and so would all that is started here.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def ended(process, folder, timeout=600):
    """Wait for a process and return its status and all it said."""
    return process.wait(timeout), (folder / "out.txt").read_text()


def clock(seconds):
    """Due after some seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def change(folder, pattern):
    """Due at the next moment when some file, matched by its path, appears or is replaced."""
    before = None

    def due():
        nonlocal before
        now = set()
        for path in filter(pattern.search, map(str, walk(folder))):
            with suppress(FileNotFoundError):
                stat = (folder / path).stat()
                now.add((path, stat.st_ino, stat.st_mtime_ns))
        before, news = now, before is not None and bool(now - before)
        return news

    return due


def writing(folder):
    """Due as soon as a temporary file is being written."""
    return change(folder, re.compile(r"/\.[^/]*-\d+/[^/]+$"))


def saved(folder):
    """Due right after a resumable state was saved."""
    return change(folder, re.compile(r"/state/[^/]+/(\d+\.json|\d+\.npz|last\.npz)$"))


def wait_until(process, *moments):
    """Wait for each moment in turn; False where the process ended before the last."""
    for due in moments:
        while not due():
            if process.poll() is not None:
                return False
            time.sleep(0.002)
    return process.poll() is None


def group(process):
    """The living processes of a process's group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == process.pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def kill(process, whole_group=True):
    """SIGKILL to a process or to its whole group."""
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    while whole_group and group(process):
        time.sleep(0.01)


def fresh(source, target):
    """`target` as a copy of the folder `source`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
