"""Members of a seam: found by name, imported late."""

import subprocess
import sys

import pytest

from ebdiff.experiment.registry import Registry
from ebdiff.experiment.schema import Strict


class Config(Strict):
    """A member's section."""

    size: int


@pytest.fixture
def registry():
    found = Registry("codec")
    found.register("late", Config, "collections:Counter")
    found.register("here", Config, dict)
    return found


def test_members_are_callables_or_where_to_find_them(registry):
    from collections import Counter

    assert registry.member("late") is Counter
    assert registry.member("here") is dict
    assert registry.config("late") is Config
    assert registry.validate("late", {"size": 3}) == Config(size=3)
    assert registry.validate("late", Config(size=3)) == Config(size=3)


def test_a_member_is_imported_when_it_is_asked_for():
    program = """
import sys
from ebdiff.experiment.registry import Registry
from ebdiff.experiment.schema import Strict
registry = Registry("hook")
registry.register("torch", type("Config", (Strict,), {}), "torch:zeros")
registry.validate("torch", {})
assert "torch" not in sys.modules
registry.member("torch")
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_has_one_meaning(registry):
    registry.register("here", Config, dict)  # a module imported twice says the same
    with pytest.raises(ValueError, match="codec 'here' is registered already"):
        registry.register("here", Config, list)


@pytest.mark.parametrize("ask", ["config", "member"])
def test_unknown_names_are_told_with_a_guess(registry, ask):
    with pytest.raises(ValueError, match="codec 'lat' is not known; did you mean 'late'"):
        getattr(registry, ask)("lat")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, r"late\.size: Field required"),
        ({"size": 1, "sise": 2}, r"late\.sise: unknown key; 'sise' is not known; did you mean 'size'"),
        ({"size": "x"}, r"late\.size: Input should be a valid integer"),
        (7, "late: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_section_is_one_line(registry, raw, said):
    with pytest.raises(ValueError, match=said) as error:
        registry.validate("late", raw)
    assert "\n" not in str(error.value)
