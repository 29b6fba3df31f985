"""Whole numbers among arguments: Python's and NumPy's integers, as torch takes them."""

from __future__ import annotations

import numbers


def whole_number(value: object, *, of_floats: bool = False) -> int | None:
    """Return an integer of Python or NumPy as an int; None for anything else, bools among them.

    Args:
        value: what a caller gave.
        of_floats: take floats without a fraction too.

    Examples:
        >>> import numpy
        >>> whole_number(numpy.int64(3)), whole_number(3.0), whole_number(3.0, of_floats=True), whole_number(True)
        (3, None, 3, None)
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real if of_floats else numbers.Integral):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() else None


def keep_whole_numbers(record: object, **fields: int | None) -> None:
    """Write fields of a frozen dataclass that are NumPy's integers as ints; nothing is done if all are ints or None."""
    for name, value in fields.items():
        if value is not None and type(value) is not int:
            object.__setattr__(record, name, whole_number(value))
