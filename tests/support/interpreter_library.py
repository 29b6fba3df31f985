"""What Triton's interpreter needs of a version of itself that is older than the numpy beside it."""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    """Let tensors of one element be indices, as bounds of loops are.

    Triton 3.6 makes numbers of arrays of one element for that, which numpy 2.4 refuses. Without effect where there is
    no Triton, and under versions that reshape the array themselves.
    """
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return
    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.reshape(())))

    interpreter._patch_lang_tensor = patch_with_index
