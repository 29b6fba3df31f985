"""The observer of a fake quantizer, made by what a user named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tritonq.observers.base import ObserverBase
from tritonq.qparams import QuantizedType


def make_observer(observer: Callable[..., Any], **arguments: Any) -> ObserverBase:
    """Return the observer that a class or factory makes of ``arguments``.

    Raises:
        TypeError: it makes something that is not tritonq's, such as torch.ao's observer of the same name.
    """
    made = observer(**arguments) if callable(observer) else observer
    if not isinstance(getattr(made, "qtype", None), QuantizedType):
        kind = type(made)
        raise TypeError(
            f"observer must be a class or factory of tritonq's observers (own ones inherit RangeObserver), got "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return made  # type: ignore[no-any-return]  # which kind of observer it is, its own methods say
