"""Plain values from YAML that anybody may have written: mappings, lists, text, numbers, and nothing else."""

from __future__ import annotations

import unicodedata
from typing import Any

import yaml

from ebdiff.system.errors import UserError

DEPTH = 10  # levels of nesting; an experiment has five
OBEYED = "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # new lines, directions
VALUES = 10_000  # of one file; its aliases count as often as they stand there


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice in one mapping, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def mapping(text: str, where: str) -> dict[Any, Any]:
    """The mapping that YAML text holds; `where` is what messages call it, such as the file's name.

    Raises:
        UserError: not YAML, not a mapping, or values that no setting has: dates, unprintable characters,
            numbers beyond 64 bits, aliases that go in circles or multiply.
    """
    try:
        raw = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {_line(error.problem or error.context)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML: {_line(error)}") from None
    except Exception as error:  # PyYAML's constructors raise almost anything
        raise UserError(f"{where}: not valid YAML: an odd tag, date or number ({_line(error)})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be a mapping of keys to values")
    _check(raw, where)
    return raw


def _check(raw: dict, where: str) -> None:
    """Refuse what no setting has, before anything walks through it or prints it."""
    waiting: list[tuple[str, int, Any]] = [("", 0, raw)]
    for _ in range(VALUES):
        if not waiting:
            return
        key, depth, value = waiting.pop()
        if reason := _odd(value):
            raise UserError(f"{where}: {key}: {reason}")
        if depth > DEPTH:
            raise UserError(f"{where}: {key}: nested more than {DEPTH} deep")
        if isinstance(value, dict):
            if odd := [k for k in value if not isinstance(k, str | int) or _odd(k) or "\n" in str(k)]:
                raise UserError(f"{where}: {key or 'top level'}: {str(odd[0])[:40]!r} can't be a key")
            waiting += [(f"{key}.{k}".lstrip("."), depth + 1, v) for k, v in value.items()]
        if isinstance(value, list):
            waiting += [(f"{key}.{i}", depth + 1, v) for i, v in enumerate(value)]
    raise UserError(f"{where}: more than {VALUES:,} values; do its aliases (& and *) multiply?")


def _odd(value: Any) -> str | None:
    """Why a value can't be a setting."""
    if isinstance(value, str):
        odd = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None)
        odd = odd or next((c for c in value if c in OBEYED), None)
        return odd and f"holds the unprintable character {odd!r}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is a number beyond 64 bits"
    if not isinstance(value, dict | list | int | float | None):
        return f"is a {type(value).__name__}; put it in quotes if it is meant as text"
    return None


def _line(message: object) -> str:
    return " ".join(str(message).split())[:200]
