"""A progress bar where tqdm is installed, nothing where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """Yield ``items`` behind a bar on standard error that vanishes when it is done; only on terminals."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield from items
        return
    yield from tqdm(items, total=total, desc=label, unit=unit, leave=False, dynamic_ncols=True, disable=None)
