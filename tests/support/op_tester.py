"""What the tests of every operator share: the backends, and inputs in every layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tritonq.backend import Backend, has_triton


def backends() -> list[Any]:
    """Return the backends that an operator's tests run on.

    ``torch`` always, ``cuda`` with a GPU; where triton is installed, ``interpreter`` and ``emulator`` in runs of their
    own (``--kernels``, see `conftest.py`).
    """
    found: list[Any] = ["torch"]
    if has_triton():
        found += [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("interpreter", "emulator")]
        if torch.cuda.is_available():
            found.append("cuda")
    return found


class OpTester:
    """Base of an operator's tests: each of them runs once per backend.

    Attributes:
        architecture: compute capability that kernels are compiled for where they are emulated; 80 for those with
            matrix products, since the emulator does not know ``wgmma``.
        check_races: whether the emulator looks for races, for which it copies all memory of a launch.
    """

    architecture = 90
    check_races = True

    @pytest.fixture(params=backends())
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def device(self, backend: str) -> str:
        return "cuda" if backend == "cuda" else "cpu"

    @pytest.fixture
    def use(self, backend: str) -> Backend:
        """The ``backend=`` argument."""
        return "torch" if backend == "torch" else "triton"

    @pytest.fixture(autouse=True)
    def emulated_gpu(self, backend: str) -> Iterator[None]:
        """CPU tensors run compiled kernels."""
        if backend != "emulator":
            yield
            return
        from emulator import EmulatedGpu, emulated

        with emulated(EmulatedGpu(self.architecture, check_races=self.check_races)):
            yield

    @pytest.fixture(autouse=True)
    def many_programs(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Small tiles in the interpreter, so that small tensors take many programs and end in partial tiles."""
        if backend != "interpreter":
            yield
            return
        from tritonq.kernels import launch_sizes, reduction

        monkeypatch.setattr(reduction, "_MIN_ELEMENTS_PER_PROGRAM", 100)
        # Two partial results of each channel at a time: the loop that joins them turns several times.
        monkeypatch.setattr(reduction, "_JOINED_ELEMENTS", 16)
        clear_plans()
        with launch_sizes.override(
            launch_sizes.EVERY_KERNEL, launch_sizes.Parameters(elements=64, max_cols=32, warps=4)
        ):
            yield
        clear_plans()


def operators(family: str, use: str) -> Any:
    """Return the module whose functions run ``backend=use``, for tensors that the test has moved to its device."""
    return importlib.import_module(f"tritonq.{'reference' if use == 'torch' else 'kernels'}.{family}")


@contextmanager
def few_programs() -> Iterator[None]:
    """Give each program all that it can take, so that its loops over memory turn several times."""
    from tritonq.kernels import activation, reduction, rounded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "_MIN_ELEMENTS_PER_PROGRAM", 10**6)
        patch.setattr(rounded, "programs_that_fill", lambda device: 2)
        patch.setattr(activation, "_RANGE_BLOCK", 2)
        clear_plans()
        yield
    clear_plans()


def clear_plans() -> None:
    """Forget what was planned under other settings."""
    from tritonq.kernels import conv2d, float_blocks, launch_sizes, layout, reduction

    plans = (launch_sizes._plan, float_blocks._plan, conv2d._tuned_tile, reduction.planned_reduction)
    for cached in (*plans, launch_sizes._parameters, layout.view):
        cached.cache_clear()


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3


# A tensor of each kind of strides. All but the last have a view without a copy.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(0.3),
    "one element": lambda: torch.tensor([[-1.7]]),
    "empty": lambda: torch.zeros(0, 3),
    "empty channels": lambda: torch.zeros(3, 0),
    "vector": lambda: _normal(131),
    "odd": lambda: _normal(3, 5, 7, 3),
    "size-1 axes": lambda: _normal(1, 5, 1, 9),
    "channels_last": lambda: _normal(2, 5, 4, 7).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: _normal(2, 3, 2, 3, 5).to(memory_format=torch.channels_last_3d),
    "sliced": lambda: _normal(4, 6, 10)[::2, :, 1:],
    "offset": lambda: _normal(40)[3:],
    "transposed": lambda: _normal(21, 18).t(),
    "permuted": lambda: _normal(3, 4, 5, 6).permute(2, 0, 3, 1),
    "expanded": lambda: _normal(5, 1).expand(5, 30),
    "many rows": lambda: _normal(70, 3, 4),
    "many outer": lambda: _normal(11, 2, 70),
    "copied": lambda: _normal(4, 6, 8, 10, 3)[::2, ::2, ::2, ::2],
}


def memory_formats(shape: tuple[int, ...]) -> list[torch.memory_format]:
    """Return the formats that a tensor of this shape may have."""
    last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *last.get(len(shape), [])]


def axes(x: Tensor) -> list[int | None]:
    """Per tensor, every axis, and the last one counted from the end."""
    return [None, *range(x.dim()), *([-1] if x.dim() else [])]


@st.composite
def strided_tensors(draw: st.DrawFn) -> Tensor:
    """Return tensors of up to four dimensions, permuted, stepped or expanded, with values on and off the ties."""
    shape = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    steps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    seed = draw(st.integers(0, 2**31))
    full = [size * step for size, step in zip(shape, steps, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    # Quarter steps: a third of them are ties at scale 0.5.
    x = torch.randint(-400, 400, full, generator=generator) / 4 + draw(st.sampled_from([0.0, 1e-3]))
    x = x[tuple(slice(None, None, step) for step in steps)]
    return x.permute(draw(st.permutations(range(len(shape)))))
