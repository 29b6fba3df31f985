"""The own class of a module whose forward `prepare_qat` edited: it gives such modules a subclass of their class."""

from __future__ import annotations


def original_class(module: object) -> type:
    """Return the class of a module as its author wrote it; for a module without edited forward simply its class."""
    kind: type = type(module)
    return getattr(kind, "_tritonq_class", kind)
