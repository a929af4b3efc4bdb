"""Members of a seam by name: how a network, a dataset, a codec or a hook comes in, the built-in ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ebdiff.system.errors import unknown


def located(member: str | Callable) -> Callable:
    """A callable, or the one at ``module:attribute``, imported now."""
    if callable(member):
        return member
    module, attribute = member.split(":")
    return getattr(import_module(module), attribute)


def first_wrong(error: ValidationError) -> tuple[ErrorDetails, str]:
    """The error to tell, and its words: a misspelt key first, of which a missing one is the consequence."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    return first, first["msg"].removeprefix("Value error, ")


class Registry:
    """Members of a seam by name: a typed config, and where its implementation is found when it is needed.

    Messages begin with `what` a member is, in one word such as ``hook``, or the key that names one.
    """

    def __init__(self, what: str):
        self.what = what
        self._members: dict[str, tuple[type[BaseModel], str | Callable]] = {}

    def register(self, name: str, config: type[BaseModel], member: str | Callable) -> None:
        """Let a member in.

        Args:
            name: as experiments call it.
            config: the type of its section.
            member: a callable, or ``module:attribute``, imported when it is first asked for:
                configurations are read without torch.

        Raises:
            ValueError: another member has that name.
        """
        if self._members.setdefault(name, (config, member)) != (config, member):
            raise ValueError(f"{self.what} {name!r} is registered already")

    def __iter__(self) -> Iterator[str]:
        """The members' names, in the order in which they came in."""
        return iter(self._members)

    def config(self, name: str) -> type[BaseModel]:
        """The type of a member's section.

        Raises:
            ValueError: unknown; says what is known.
        """
        if name not in self._members:
            raise ValueError(f"{self.what} {unknown(name, self._members)}")
        return self._members[name][0]

    def member(self, name: str) -> Callable:
        """A member's implementation.

        Raises:
            ValueError: unknown; says what is known.
        """
        self.config(name)
        return located(self._members[name][1])

    def validate(self, name: str, raw: Mapping[str, Any]) -> BaseModel:
        """A member's section, checked.

        Raises:
            ValueError: unknown, or a wrong key; one line that begins with the name.
        """
        config = self.config(name)
        try:
            return config.model_validate(raw)
        except ValidationError as error:
            first, message = first_wrong(error)
            if first["type"] == "extra_forbidden":
                message = f"unknown key; {unknown(first['loc'][-1], config.model_fields)}"
            raise ValueError(f"{'.'.join([name, *map(str, first['loc'])])}: {message}") from None
