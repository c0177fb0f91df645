"""Names that other clients have for what is here: a program that was moved is told ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

__all__ = ["KnowsOtherNames"]

OTHER_NAMES: Final = {"create_rest_client": "control_plane"}
"""Other clients' names, and ours. A name that ends in ``_async`` needs no entry: here it has no such end."""


class KnowsOtherNames:
    """The `AttributeError` of a missing name says what it is called here."""

    if not TYPE_CHECKING:  # a type checker would believe that every name exists

        def __getattr__(self, name: str) -> Any:
            kind = type(self)
            ours = OTHER_NAMES.get(name, name.removesuffix("_async"))
            hint = f"; here it is {ours!r}" if ours != name and hasattr(kind, ours) else ""
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)
