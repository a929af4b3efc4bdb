"""Failing disks and damaged files: each is noticed, named in one line, and remade by the command it names."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, write_experiment
from stages import DENSE, EB, FID, RANDOM, SAMPLE, TABLE, WHERE, path_of, run
from test_workflow import snakemake

from ebdiff.experiment import layout, load, records
from ebdiff.experiment.jobs import Job, jobs, maker
from ebdiff.experiment.records import Records
from ebdiff.system import files
from ebdiff.system.errors import Unusable, UserError


@pytest.fixture
def project(made, monkeypatch):
    """The finished project to damage; the file is put back with its dates, by which Snakemake judges."""
    monkeypatch.chdir(made)
    kept = {}

    def damage(path, fault):
        if path not in kept:
            kept[path] = path.read_bytes(), [(p, p.stat()) for p in (path, path.parent)]
        FAULTS[fault](path, kept[path][0])

    yield damage
    for path, (content, dated) in kept.items():
        path.write_bytes(content)
        for dated_path, was in dated:
            os.utime(dated_path, ns=(was.st_atime_ns, was.st_mtime_ns))


def flip(content, where):
    """One bit turned, at a share of the length."""
    data = bytearray(content)
    data[int(len(data) * where)] ^= 4
    return bytes(data)


FAULTS = {
    "missing": lambda path, content: path.unlink(),
    "empty": lambda path, content: path.write_bytes(b""),
    "truncated": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "flipped early": lambda path, content: path.write_bytes(flip(content, 0.2)),
    "flipped late": lambda path, content: path.write_bytes(flip(content, 0.7)),
}
ENDED = Counter()


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    print(f"\n{ENDED.total()} faults injected: {dict(ENDED)}")


# What reads each kind of file; the first that does, as a user would meet it.
READ_BY = [
    (layout.IMAGES, ("train-dense", "tiny")),
    (layout.MANIFEST, ("train-dense", "tiny")),
    (layout.LABELS, ("train-classifier", "digits")),
    (layout.CLASSIFIER, ("reference-stats", "digits")),
    (layout.REFERENCE, FID),
    (layout.REFERENCE_FEATURES, FID),
    (layout.DENSE_MASKS, ("prune-per-epoch", "tiny")),
    (layout.SNAPSHOT, ("select-eb-epoch", "tiny", "--rate", "0.5")),
    (layout.DENSE_LAST, DENSE),
    (layout.MASKS, ("hamming-matrix", "tiny")),
    (layout.MASKS, ("select-eb-epoch", "tiny", "--rate", "0.5")),
    (layout.STORY, RANDOM),
    (layout.TICKET, EB),
    (layout.MILESTONE, SAMPLE),
    (layout.SAMPLES, FID),
    (layout.SAMPLE_LEDGER, FID),
    (layout.SAMPLES, TABLE),
    (layout.HAMMING, TABLE),
    (layout.METRICS, TABLE),
    (layout.STORY, TABLE),
    (layout.LEDGER, TABLE),
    (layout.DENSE_LEDGER, TABLE),
    (layout.COST, TABLE),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("template", "verb"), READ_BY, ids=lambda v: v[0] if isinstance(v, tuple) else None)
def test_a_damaged_file_is_one_line_that_names_it_and_how_to_remake_it(
    project, capsys, template, verb, fault
):
    path = path_of(template)
    project(path, fault)
    before = everything()
    capsys.readouterr()
    status = run(*verb)
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"ebdiff: {path}: " + ("missing; " if fault == "missing" else "damaged ("))
    output = re.search(r"`(?:rm -r (\S+) && )?snakemake --cores all (\S+)`$", lines[0])
    assert output, lines[0]
    assert str(path).startswith(output[2])
    assert everything() == before  # nothing was written
    ENDED[f"{path.suffix} {fault}: one line that names the file"] += 1


def everything():
    """Every file of the project's results and data, with its time."""
    found = [p for folder in ("results", "resources") for p in Path(folder).rglob("*") if p.is_file()]
    return {p: p.stat().st_mtime_ns for p in found}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "missing"])
def test_damaged_readings_are_left_out_of_a_report_so_far_and_refused_by_a_whole_one(project, fault):
    from ebdiff.report.results import Results

    experiment = load.load("tiny")
    expert = experiment.runs["eb-50"].experts[0]
    path = layout.path(layout.STATS, **WHERE)
    assert len(Results(experiment).losses(0, expert)) == 4
    project(path, fault)
    with pytest.raises(Unusable, match=r"40\.stats\.jsonl: damaged"):
        Results(experiment).losses(0, expert)
    partial = Results(experiment, partial=True)
    assert len(partial.losses(0, expert)) == 0
    assert "40.stats.jsonl: damaged" in partial.left_out[0]
    ENDED[f"{path.suffix} {fault}: one line that names the file"] += 1


# --- every file of a finished project, every way ------------------------------------------------------------


def swaps(path, others):
    """Whole and valid files in the wrong place: one of the same kind, and one of any other kind."""
    alike = [p for p in others if p.suffix == path.suffix and p.read_bytes() != path.read_bytes()]
    return [alike[0], alike[-1]] if alike else []


@pytest.fixture
def recorded(made, tmp_path, monkeypatch):
    """The experiment of a finished project that may be damaged, and its jobs that left records."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "project"))
    experiment = load.load("tiny")
    return experiment, [job for job in jobs(experiment) if job.note("records", "json").exists()]


@pytest.mark.slow
def test_no_damaged_swapped_or_foreign_file_is_ever_taken_for_what_a_stage_made(recorded):
    experiment, there = recorded
    files_of = {f for job in there for p in job.makes for f in (p.glob("[!.]*") if p.is_dir() else [p])}
    assert {maker(experiment, f).stage.verb for f in files_of} == {job.stage.verb for job in there}
    for path in sorted(files_of):
        content = path.read_bytes()
        Records(experiment).check(path)
        faults = {name: FAULTS[name] for name in FAULTS}
        for other in swaps(path, sorted(files_of)):
            foreign = other.read_bytes()
            faults[f"{other} in its place"] = lambda path, _, foreign=foreign: path.write_bytes(foreign)
        for name, fault in faults.items():
            fault(path, content)
            with pytest.raises(Unusable) as caught:
                Records(experiment).check(path)
            assert str(caught.value).startswith(f"{path}: "), name
            assert "\n" not in str(caught.value)
            path.write_bytes(content)
            ENDED[f"{path.suffix} {name.split()[0]}: named by its record"] += 1
    assert sum(n for k, n in ENDED.items() if k.endswith("by its record")) > 300


@pytest.mark.slow
def test_no_damaged_swapped_or_foreign_record_is_ever_believed(recorded):
    experiment, there = recorded
    notes = [job.note("records", "json") for job in there]
    for job, note in zip(there, notes, strict=True):
        content = note.read_bytes()
        path = next(f for p in job.makes for f in (sorted(p.glob("[!.]*")) if p.is_dir() else [p]))
        faults = {**FAULTS, "not an object": lambda p, _: p.write_text("[1]")}
        other = notes[notes.index(note) - 1]
        faults["another job's"] = lambda path, _, other=other: shutil.copy(other, path)
        for name, fault in faults.items():
            note.unlink(missing_ok=True)
            note.write_bytes(content)
            fault(note, content)
            with pytest.raises(Unusable) as caught:
                Records(experiment).check(path)
            assert str(note) in str(caught.value), (name, str(caught.value))
            assert "\n" not in str(caught.value)
            ENDED[f"record {name}: named"] += 1
        note.unlink()
        note.write_bytes(content)


def test_no_flipped_bit_goes_unnoticed(workspace, tiny):
    path = layout.path(layout.MANIFEST, dataset="digits")
    content, noticed = path.read_bytes(), 0
    for bit in range(8 * len(content)):
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(Unusable, match=r"manifest\.json: damaged"):
            Records(tiny).check(path)
        noticed += 1
    assert noticed > 1000
    ENDED["any bit flipped: named by its record"] += noticed


@pytest.mark.parametrize("inside", [(), ("0.safetensors",)])
def test_a_folder_in_its_place_is_no_file(workspace, tiny, inside):
    path = layout.path(layout.MANIFEST, dataset="digits")
    path.unlink()
    path.mkdir()
    for name in inside:
        (path / name).write_bytes(b"")
    with pytest.raises(Unusable, match=r"^\S+manifest\.json: not what its job made"):
        Records(tiny).check(path)


def test_verify_goes_on_after_a_file_that_cannot_be_opened(workspace, tiny):
    loop, other = (layout.path(t, dataset="digits") for t in (layout.IMAGES, layout.MANIFEST))
    loop.unlink()
    loop.symlink_to(loop.name)
    other.write_bytes(b"")
    found = dict(records.verify(tiny, [Job.of(tiny, "prepare-data")]))
    assert found.keys() == {loop, other}
    assert "Too many levels of symbolic links" in found[loop]


def test_large_files_are_trusted_by_size_and_date_and_read_whole_when_asked(workspace, tiny, monkeypatch):
    read = []
    monkeypatch.setattr(records, "sha256", lambda path: read.append(path) or files.sha256(path))
    path = layout.path(layout.IMAGES, dataset="digits")
    Records(tiny).check(path)
    assert read == []
    os.utime(path)  # as Snakemake does, or a copy
    Records(tiny).check(path)
    assert read == [path]  # once, and its new date is noted
    Records(tiny).check(path)
    assert read == [path]
    Records(tiny, deep=True).check(path)
    assert read == [path, path]
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Unusable, match=r"images\.npy: damaged"):
        Records(tiny).check(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # what only reading it whole can tell
    with pytest.raises(Unusable, match=r"images\.npy: damaged"):
        Records(tiny, deep=True).check(path)


@pytest.mark.slow
def test_verify_names_everything_that_is_not_what_its_stage_made(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(folder)
    assert run("verify", "tiny") == 0
    assert "everything that is there is what its stage made" in capsys.readouterr().out
    damaged = [path_of(t) for t in (layout.IMAGES, layout.SNAPSHOT, layout.METRICS)]
    for path in damaged:
        path.write_bytes(flip(path.read_bytes(), 0.5))
    assert run("verify", "tiny") == 1
    said = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.out.splitlines()] == [str(p) for p in damaged]
    assert "3 files can't be used" in said.err


@pytest.mark.slow
def test_a_snapshot_of_another_interval_gives_no_other_ticket(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(folder)
    snapshots = sorted(path_of(layout.SNAPSHOT).parent.glob("*.safetensors"))
    assert len(snapshots) > 1
    shutil.copy(snapshots[0], snapshots[-1])
    assert run("select-eb-epoch", "tiny", "--rate", "0.5") == 1
    assert f"{snapshots[-1]}: damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_equal_networks_are_equal_files(tmp_path):
    write = (
        "import sys, torch; from pathlib import Path; from ebdiff.nets import store\n"
        "store.write(Path(sys.argv[1]), {'b': torch.ones(3), 'a': torch.zeros(2)}, {'x': 1, 'story': {}})"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", write, tmp_path / name], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("fault", ["empty", "truncated"])
def test_a_damaged_tuning_is_one_line(tmp_path, monkeypatch, fault):
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tuning(tmp_path)
    FAULTS[fault](path, path.read_bytes())
    with pytest.raises(UserError, match=r"tuning/tiny\.yaml"):
        load.load("tiny")


def test_a_flipped_bit_of_a_tuning_is_an_error_harmless_or_other_settings(tmp_path, monkeypatch):
    """Configuration is the user's to edit and carries no checksum, but what it changes is never mixed."""

    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tuning(tmp_path)
    whole = load.load("tiny")
    content, ended = path.read_bytes(), Counter()
    for bit in range(8 * len(content)):
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = load.load("tiny")
        except UserError as error:
            assert "tiny.yaml" in str(error) and "\n" not in str(error)
            ended["one line that names the file"] += 1
            continue
        if found.tuning.training == whole.tuning.training and found.tuning.sampling == whole.tuning.sampling:
            ended["harmless"] += 1
            continue
        milestone = layout.path(layout.MILESTONE, **WHERE)
        samples = layout.path(layout.SAMPLE_LEDGER, **WHERE)
        differ = [
            Records(found).settings(maker(found, p)) != Records(whole).settings(maker(whole, p))
            for p in (milestone, samples)
        ]
        other = {n for n in (*found.tuning.training, *found.tuning.sampling) if n not in ("0.5", "dense")}
        assert any(differ) or other, f"bit {bit}"
        ended["other settings"] += 1
    assert ended["one line that names the file"] > 100
    ENDED.update({f".yaml any bit flipped: {how}": n for how, n in ended.items()})


def tuning(folder):
    path = folder / "config/tuning/tiny.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "device: a CPU\n"
        "training:\n  '0.5': {precision: bf16, channels_last: true}\n"
        "sampling:\n  '0.5': {precision: bf16, channels_last: false}\n"
    )
    return path


@pytest.mark.parametrize("fault", ["empty", "truncated", "flipped early", "flipped late"])
def test_a_damaged_parquet_source_is_one_line(tmp_path, fault):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from ebdiff.data.sources import write

    def png(i):
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    path = tmp_path / "train.parquet"
    table = pa.table({"image": [png(i) for i in range(40)], "label": list(range(40))})
    pq.write_table(table, path, write_page_checksum=True, compression="none")
    from conftest import TINY

    changes = {
        "dataset.source": "images",
        "dataset.path": str(path),
        "dataset.name": "mine",
        "dataset.subset": ...,
    }
    experiment = load.parse(changed(TINY, changes), "tiny.yaml")
    outputs = [
        tmp_path / "data" / name for name in ("images.npy", "labels.npy", "held_out.npy", "manifest.json")
    ]
    FAULTS[fault](path, path.read_bytes())
    with pytest.raises(UserError, match=r"train\.parquet") as caught:
        write(experiment, *outputs)
    assert "\n" not in str(caught.value)
    assert not any(p.exists() for p in outputs)
    ENDED[f".parquet {fault}: one line that names the file"] += 1


# --- the whole way: damage, the message, the command it names, the same command again -----------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "spared"),
    [
        pytest.param(layout.TICKET, (layout.DENSE_LAST, layout.MASKS), id="a ticket"),
        pytest.param(layout.SAMPLES, (layout.TICKET, layout.MILESTONE), id="samples", marks=pytest.mark.long),
    ],
)
def test_the_command_that_a_message_names_remakes_what_is_damaged_and_nothing_before(
    tmp_path, made, monkeypatch, template, spared
):
    folder = shutil.copytree(made, tmp_path / "project")  # keeps the dates
    monkeypatch.chdir(folder)
    path, metrics = path_of(template), layout.path(layout.METRICS, **WHERE)
    reader = layout.path(layout.MILESTONE if template == layout.TICKET else layout.METRICS, **WHERE)
    before = {**everything(), "content": path.read_bytes(), "metrics": files.read_json(metrics)}
    path.write_bytes(flip(path.read_bytes(), 0.7))
    reader.unlink()
    done = snakemake(folder, str(metrics))
    assert done.returncode != 0, done.stderr
    said = re.findall(
        rf"ebdiff: {path}: damaged .*with `(rm -r .*)`$", done.stdout + done.stderr, re.MULTILINE
    )
    assert said, done.stderr

    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", said[0]], env=env, check=True, capture_output=True, timeout=600)
    assert path.read_bytes() == before["content"]
    done = snakemake(folder, str(metrics))
    assert done.returncode == 0, done.stderr
    after, timed = files.read_json(metrics), {"seconds", "protocols"}
    assert {k: v for k, v in after.items() if k not in timed} == {
        k: v for k, v in before["metrics"].items() if k not in timed
    }
    for template in spared:
        untouched = layout.path(template, **WHERE)
        assert untouched.stat().st_mtime_ns == before[untouched]
    ENDED[f"{path.suffix} flipped, remade by the command that its message names"] += 1
