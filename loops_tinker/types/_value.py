"""What every value of this package has in common."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Self, cast

import numpy as np

__all__ = ["Value"]


class Value:
    """A frozen dataclass, with those methods of a pydantic model that scripts call on it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def model_dump(self, *, mode: str = "python", exclude_none: bool = False) -> dict[str, Any]:
        """Return the fields as a dict, in which values are dicts, too.

        Args:
            mode: ``"json"`` also turns bytes into base64 and times into text.
            exclude_none: leave out what is None.
        """
        return cast("dict[str, Any]", _plain(self, is_json=mode == "json", exclude_none=exclude_none))

    def model_dump_json(self, *, indent: int | None = None, exclude_none: bool = False) -> str:
        """Return the fields as JSON."""
        return json.dumps(self.model_dump(mode="json", exclude_none=exclude_none), indent=indent)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, in which the fields of `update` are replaced."""
        changed = dataclasses.replace(self, **(update or {}))
        return copy.deepcopy(changed) if deep else changed


def _plain(value: Any, *, is_json: bool, exclude_none: bool) -> Any:
    def inner(each: Any) -> Any:
        return _plain(each, is_json=is_json, exclude_none=exclude_none)

    if isinstance(value, Value):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return {name: inner(each) for name, each in fields.items() if not (exclude_none and each is None)}
    if isinstance(value, Mapping):
        return {name: inner(each) for name, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [inner(each) for each in cast("list[Any]", value)]
    if isinstance(value, np.ndarray | np.generic):
        return cast("Any", value).tolist()
    if is_json and isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if is_json and isinstance(value, datetime) else value
