"""The keys of an experiment file as Markdown tables (docs/keys.md), from its JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ebdiff.experiment import load

Part = dict[str, Any]  # a part of a JSON schema


def markdown() -> str:
    """A table for every section: keys, what they take, defaults and meanings."""
    schema = load.schema()
    lines = [
        "# Keys of an experiment file",
        "",
        "Written by `ebdiff schema --markdown > docs/keys.md`. A file of `config/experiments` may leave "
        "out whatever its `base` says; `null` removes a named run, search or table.",
    ]
    for path, member, part in _sections(schema):
        title = f"`{path}`" if path else "The file itself"
        lines += ["", f"## {title}, {member}" if member else f"## {title}", ""]
        lines += [part["description"].split("\n")[0], ""] if "description" in part else []
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
        for key, of in part["properties"].items():
            default = json.dumps(of["default"]) if "default" in of else "–"
            cells = (f"`{key}`", _takes(of), default if len(default) < 40 else "", of.get("description", ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _sections(schema: Part) -> Iterator[tuple[str, str, Part]]:
    """The file's own keys, then each section and those inside it, once: where, of which member, its part."""
    parts, seen, waiting = schema["$defs"], set(), [("", "", schema)]
    while waiting:
        path, member, part = waiting.pop(0)
        yield path, member, part
        for key, of in part["properties"].items():
            for name in _named(of):
                if name not in seen and parts[name].get("properties"):
                    seen.add(name)
                    values = parts[name]["properties"].values()
                    own = next((str(value["const"]) for value in values if "const" in value), "")
                    below = (f"{path}." if path else "") + key + ".NAME" * ("patternProperties" in of)
                    waiting.append((below, own, parts[name]))


def _named(part: Any) -> Iterator[str]:
    """The sections that a part of the schema refers to, in order."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"].split("/")[-1]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _named(inner)


def _takes(part: Part) -> str:
    """What a key takes, in words."""
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_takes(p) for p in part["anyOf"]))
    if "enum" in part or "const" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if "patternProperties" in part or "additionalProperties" in part:
        return "a mapping from names"
    if part.get("type") == "array":
        inner = _takes(part["items"]) if "items" in part else "two numbers"
        return inner if inner == "two numbers" else f"a list: {inner}"
    if "type" not in part:
        return "a section"
    word = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "null": "`null`"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for key, sign in bounds.items() if key in part]
    return " ".join([word.get(part["type"], "text"), ", ".join(limits)]).strip()
