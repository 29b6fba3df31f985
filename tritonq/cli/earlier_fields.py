"""Data of files that an earlier version wrote: fields that it did not have yet get their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any


def required_fields(cls: type) -> list[str]:
    """Return the names of the fields of a dataclass that have no default; these come first in it."""
    return [field.name for field in fields(cls) if _default(field) is MISSING]


def with_defaults(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data``, the fields of a dataclass by name, and beside them the default of each field that it lacks.

    A field without a default that ``data`` lacks is lacking in the result, too; names that are no fields stay.
    """
    defaults = {field.name: _default(field) for field in fields(cls)}
    return {**{name: value for name, value in defaults.items() if value is not MISSING}, **data}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
