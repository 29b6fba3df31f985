"""The class of a module whose forward was edited: `prepare_qat` gives it a subclass of its own."""

from __future__ import annotations


def original_class(module: object) -> type:
    """Return the class of a module as its author wrote it."""
    kind: type = type(module)
    return getattr(kind, "_tritonq_class", kind)
