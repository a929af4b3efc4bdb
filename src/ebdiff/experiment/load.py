"""Reading experiments: YAML with inheritance, checked, scaled; errors in one line; the JSON schema."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model

from ebdiff.experiment import plain
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import SECTIONS, config_of
from ebdiff.experiment.registry import first_wrong
from ebdiff.experiment.runs import Expert, Run
from ebdiff.experiment.schema import Execution, Interval, PrimaryClaim, Search, Tuning, is_name
from ebdiff.experiment.sparsity import METHODS
from ebdiff.system.errors import UserError, unknown
from ebdiff.system.files import naming

EXPERIMENTS = Path("config/experiments")
TEXT = 2**18  # bytes of a file; PyYAML takes seconds for more

T = TypeVar("T", bound=BaseModel)


def names(folder: Path = EXPERIMENTS) -> list[str]:
    """The experiments that there are files of.

    Raises:
        UserError: this is no project's folder.
    """
    if not folder.is_dir():
        raise UserError(f"no {folder} here; run ebdiff in a project's folder, where its Snakefile is")
    return sorted(p.stem for p in folder.glob("*.yaml") if is_name(p.stem) and p.is_file())


def _merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`, dictionaries merged key by key; null removes a named entry.

    With a run, the claims of `base` about it are removed.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    for table in ("runs", "searches", "tables"):
        if isinstance(merged.get(table), dict):
            merged[table] = {k: v for k, v in merged[table].items() if v is not None}
    if "claims" not in over and isinstance(base.get("claims"), list) and isinstance(over.get("runs"), dict):
        gone = [name for name, run in over["runs"].items() if run is None]
        merged["claims"] = [
            c
            for c in base["claims"]
            if not isinstance(c, dict) or not {c.get("run"), c.get("against")} & set(gone)
        ]
    return merged


def _mapping(path: Path) -> dict:
    """A YAML file whose top level is a mapping."""
    try:
        with naming(path):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise UserError(f"{path}: not a file; remove it")
            if path.stat().st_size > TEXT:
                raise UserError(f"{path}: larger than {TEXT >> 10} KiB; it can't be an experiment's")
            return deepcopy(_parsed(path.read_text(encoding="utf-8"), str(path)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as such") from None


@cache
def _parsed(text: str, where: str) -> dict:
    """`plain.mapping`, once for a text: the Snakefile loads every experiment, and most have a base."""
    return plain.mapping(text, where)


def _read(name: str, folder: Path, chain: tuple[str, ...] = ()) -> dict:
    """The YAML of an experiment with its bases merged in."""
    path = folder / f"{name}.yaml"
    if name in chain:
        raise UserError(f"{path}: `base` goes in a circle: {' -> '.join((*chain, name))}")
    if not is_name(name) or not path.is_file():
        asked = f"{folder / chain[-1]}.yaml: base" if chain else "experiment"
        raise UserError(
            f"{asked} {unknown(name, names(folder))} (names in {folder}: lower-case letters, digits, - and _)"
        )
    return with_base(_mapping(path), path, (*chain, name))


def with_base(raw: dict, path: Path, chain: tuple[str, ...] = ()) -> dict:
    """The mapping of an experiment's file with its bases merged in; `chain` are those that asked for it."""
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the name of an experiment, not {base!r}")
    return _merge(_read(base, path.parent, chain or (path.stem,)), raw)


def _scaled(e: Experiment) -> Experiment:
    """Apply `scale` to iterations, pseudo-epochs, warm-up and milestones, once, at loading."""
    if e.scale == 1:
        return e

    def times(n: int) -> int:
        return max(1, round(n * e.scale))

    def expert(x: Expert) -> Expert:
        iterations = x.iterations if isinstance(x.iterations, str) else times(x.iterations)
        return _with(x, iterations=iterations, sparse=x.sparse and x.sparse.scaled(times))

    def search(s: Search) -> Search:
        pseudo = s.interval.unit == "pseudo-epoch"
        return _with(s, interval=_with(s.interval, steps=times(s.interval.steps))) if pseudo else s

    return _with(
        e,
        training=_with(e.training, warmup=round(e.training.warmup * e.scale)),
        dense=_with(e.dense, iterations=times(e.dense.iterations)),
        searches={k: search(s) for k, s in e.searches.items()},
        runs={k: _with(r, experts=tuple(map(expert, r.experts))) for k, r in e.runs.items()},
    )


def _with(model: T, **values: Any) -> T:
    return model.model_copy(update=values)


def parse(raw: dict, where: str) -> Experiment:
    """Check a raw mapping and build the experiment.

    Raises:
        UserError: one line that names the file and the first offending key.
    """
    return _scaled(_checked(Experiment, raw, where))


def _checked(model: type[T], raw: dict, where: str, *above: str) -> T:
    """A raw experiment, or the section whose place in it is `above`."""
    try:
        return model.model_validate(deepcopy(raw))  # checking fills in defaults
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, raw, above)}") from None


MOVED = {"network.image_size": "dataset.image_size", "network.channels": "dataset.channels"}
PLAIN = {  # what pydantic says in its own words
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "too_short": "needs at least one",
}


def _one_line(error: ValidationError, raw: dict, above: Sequence[str]) -> str:
    first, message = first_wrong(error)
    location = [str(part) for part in first["loc"]]
    key, message = ".".join(location), PLAIN.get(first["type"], message)
    if first["type"] == "extra_forbidden":
        if key in MOVED:
            return f"{key}: unknown key; it is {MOVED[key]} now"
        return f"{key}: unknown key; {unknown(location[-1], _fields_at([*above, *location[:-1]], raw))}"
    if first["type"] == "missing":
        return f"{key}: this key is missing"
    if first["type"] == "literal_error":
        known = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: {unknown(first['input'], known)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if not key:
        return message + more
    # Of a section, the message tells what in it is wrong.
    got = "" if isinstance(first["input"], dict) else f" (got {reprlib.repr(first['input'])})"
    return f"{key}: {message}{got}{more}"


def _fields_at(location: list[str], raw: dict) -> list[str]:
    """The keys allowed at a place of a raw experiment, for did-you-mean."""
    if not location:
        return ["base", *Experiment.model_fields]
    if location[0] == "runs":
        return [*Expert.model_fields, *Run.model_fields]
    if location[0] == "tuning" and len(location) > 1:
        return list(Execution.model_fields)
    if location[0] == "claims":
        return list(PrimaryClaim.model_fields)
    if location[0] == "searches":
        return list((Interval if location[-1] == "interval" else Search).model_fields)
    if location[0] in SECTIONS:
        return list(config_of(location[0], raw[location[0]]).model_fields)
    fields = Experiment.model_fields[location[0]].annotation.model_fields
    return [field.alias or name for name, field in fields.items()]


def load(name: str, folder: Path = EXPERIMENTS) -> Experiment:
    """Read, merge, check and scale `config/experiments/{name}.yaml`; add `config/tuning/{name}.yaml`.

    Raises:
        UserError: one line naming the file, the key and what to do.
    """
    experiment = parse({**_read(name, folder), "name": name}, str(folder / f"{name}.yaml"))
    tuned = folder.parent / "tuning" / f"{name}.yaml"
    if not tuned.exists():
        return experiment
    return _with(experiment, tuning=_checked(Tuning, _mapping(tuned), str(tuned), "tuning"))


def schema() -> dict:
    """JSON schema of an experiment file, for editors (`config/experiment.schema.json`)."""
    keys: dict[str, Any] = {
        section: (reduce(or_, map(registry.config, registry)), Experiment.model_fields[section])
        for section, (registry, _) in SECTIONS.items()
    }
    keys["base"] = (str, Field("", description="Experiment whose keys this one starts from."))
    written = create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, **keys)
    schema = written.model_json_schema()
    parts = schema["$defs"]
    methods = TypeAdapter(reduce(or_, map(METHODS.config, METHODS))).json_schema(
        ref_template="#/$defs/{model}"
    )
    parts |= methods.pop("$defs")
    parts["Expert"]["properties"]["sparse"] |= methods
    # A file may leave to its base what the merged experiment must have, or remove it with null.
    for part in (schema, *parts.values()):
        part.pop("required", None)
    for part in (parts["Run"], parts["Search"], schema["properties"]["tables"]["additionalProperties"]):
        part["type"] = [part["type"], "null"]
    interval = parts["Search"]["properties"]["interval"]
    interval["anyOf"] = [{"$ref": interval.pop("$ref")}, {"const": "epoch"}]
    # Runs may carry expert keys as defaults for their experts.
    parts["Run"]["properties"] = {**parts["Expert"]["properties"], **parts["Run"]["properties"]}
    schema["title"] = "ebdiff experiment"
    return schema
