"""Reading experiments: YAML with inheritance, checked, scaled; errors in one line; the JSON schema."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

from pydantic import ValidationError

from ebdiff.experiment import plain
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import SECTIONS, config_of
from ebdiff.experiment.runs import Expert, Run
from ebdiff.experiment.schema import Execution, Interval, Search, Tuning, is_name
from ebdiff.system.errors import UserError, unknown

EXPERIMENTS = Path("config/experiments")


def names(folder: Path = EXPERIMENTS) -> list[str]:
    """The experiments that there are files of."""
    return sorted(p.stem for p in folder.glob("*.yaml") if is_name(p.stem) and p.is_file())


def _merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`, dictionaries merged key by key; null removes a named entry."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    for table in ("runs", "searches", "tables"):
        if isinstance(merged.get(table), dict):
            merged[table] = {k: v for k, v in merged[table].items() if v is not None}
    return merged


def _mapping(path: Path) -> dict:
    """A YAML file whose top level is a mapping."""
    try:
        return plain.mapping(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as such") from None


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

    def scale_expert(x: Expert) -> Expert:
        steps = x.iterations if isinstance(x.iterations, str) else times(x.iterations)
        return x.model_copy(update={"iterations": steps})

    def scale_search(s: Search) -> Search:
        if s.interval.unit != "pseudo-epoch":
            return s
        interval = s.interval.model_copy(update={"steps": times(s.interval.steps)})
        return s.model_copy(update={"interval": interval})

    return e.model_copy(
        update={
            "training": e.training.model_copy(update={"warmup": round(e.training.warmup * e.scale)}),
            "dense": e.dense.model_copy(update={"iterations": times(e.dense.iterations)}),
            "searches": {k: scale_search(s) for k, s in e.searches.items()},
            "runs": {
                k: r.model_copy(update={"experts": tuple(map(scale_expert, r.experts))})
                for k, r in e.runs.items()
            },
        }
    )


def parse(raw: dict, where: str) -> Experiment:
    """Check a raw mapping and build the experiment.

    Raises:
        UserError: one line that names the file and the first offending key.
    """
    try:
        return _scaled(Experiment.model_validate(deepcopy(raw)))  # checking fills in defaults
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, raw)}") from None


MOVED = {"network.image_size": "dataset.image_size", "network.channels": "dataset.channels"}
PLAIN = {  # what pydantic says in its own words
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "too_short": "needs at least one",
}


def _one_line(error: ValidationError, raw: dict, above: Sequence[str] = ()) -> str:
    """The first error of a raw experiment, or of a section whose place in it is `above`."""
    # A misspelt key first: the missing one is its consequence.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    message = PLAIN.get(first["type"], first["msg"].removeprefix("Value error, "))
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
    raw = _read(name, folder)
    if raw.get("name", name) != name:
        raw.pop("name")  # inherited from the base
    experiment = parse({**raw, "name": name}, str(folder / f"{name}.yaml"))
    tuned = folder.parent / "tuning" / f"{name}.yaml"
    if not tuned.exists():
        return experiment
    return experiment.model_copy(update={"tuning": parse_tuning(_mapping(tuned), str(tuned))})


def parse_tuning(raw: dict, where: str) -> Tuning:
    """Check a raw tuning file.

    Raises:
        UserError: one line that names the file and the first offending key.
    """
    try:
        return Tuning.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, raw, ['tuning'])}") from None


def users(dataset: str, folder: Path = EXPERIMENTS) -> list[Experiment]:
    """Every experiment that uses a dataset, by name.

    Raises:
        UserError: none does.
    """
    found: list[Experiment] = []
    for name in names(folder):
        with suppress(UserError):  # a broken file elsewhere is reported when it is asked for
            experiment = load(name, folder)
            if experiment.dataset.name == dataset:
                found.append(experiment)
    if not found:
        raise UserError(f"dataset {dataset!r}: no experiment in {folder} has this dataset.name")
    return found


def schema() -> dict:
    """JSON schema of an experiment file, for editors (`config/experiment.schema.json`)."""
    schema = Experiment.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Experiment whose keys this one starts from.",
    }
    parts = schema["$defs"]
    for section, (registry, _) in SECTIONS.items():
        configs = dict.fromkeys(map(registry.config, registry))
        parts.pop(schema["properties"][section].pop("$ref").rpartition("/")[2])
        schema["properties"][section]["anyOf"] = [{"$ref": f"#/$defs/{c.__name__}"} for c in configs]
        for config in configs:
            part = config.model_json_schema(ref_template="#/$defs/{model}")
            parts |= {**part.pop("$defs", {}), config.__name__: part}
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
