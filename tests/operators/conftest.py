"""What the tests under triton-viz's sanitizer share; they run with ``--kernels=sanitizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest


def _put_under(wrap: Callable[[Any], Any], modules: tuple[ModuleType, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in modules:
        names = [name for name in vars(module) if name.endswith("_kernel")]
        assert names
        for name in names:
            monkeypatch.setattr(module, name, wrap(getattr(module, name)))


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put every kernel of modules under the sanitizer: an access out of bounds ends in SystemExit."""
    from sanitizer_library import import_triton_viz

    triton_viz = import_triton_viz()
    from triton_viz.clients import Sanitizer

    def wrap(kernel: Any) -> Any:
        return triton_viz.trace(Sanitizer(abort_on_error=True))(kernel.function)

    return lambda *modules: _put_under(wrap, modules, monkeypatch)


@pytest.fixture
def sanitize_loops(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As ``sanitize``, with loop variables as numbers: the sanitizer bounds the innermost of nested loops alone."""
    from sanitizer_library import trace_numbers

    return lambda *modules: _put_under(trace_numbers, modules, monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs and partial tiles on small tensors."""
    from op_tester import clear_plans
    from tritonq.kernels import launch_sizes, reduction

    monkeypatch.setattr(reduction, "_MIN_ELEMENTS_PER_PROGRAM", 50)
    clear_plans()
    with launch_sizes.override(launch_sizes.EVERY_KERNEL, launch_sizes.Parameters(64, 32, 4)):
        yield
    clear_plans()
