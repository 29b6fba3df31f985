"""Data of files that an earlier version wrote: fields that it did not have yet get their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any


def required_fields(cls: type) -> list[str]:
    """Return the names of the fields of the dataclass ``cls`` that have no default, in the order of the class."""
    return [field.name for field in fields(cls) if _default(field) is MISSING]


def with_defaults(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new dict: ``data``, values by field name of a dataclass, and the default of each field missing in it.

    A field that is missing in ``data`` and has no default is missing in the result, too; names that are no fields stay.
    """
    defaults = {field.name: _default(field) for field in fields(cls)}
    return {**{name: value for name, value in defaults.items() if value is not MISSING}, **data}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
