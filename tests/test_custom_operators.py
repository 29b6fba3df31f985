"""``torch.library.opcheck`` on every operator that tritonq registers, with arguments that compiled models give them.

Nothing here lists operators: they are those of torch's registry, and arguments are recorded while graphs of small
models run. An operator that no graph calls is a failing test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._ops import HigherOrderOperator
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import tritonq
import tritonq.functional.traced  # registers the operators of traced graphs
from tritonq.deploy import onnx_ops  # registers those of exports
from tritonq.functional.dispatch import implementation

NAMESPACE = "tritonq::"
# Two kinds of arguments per operator: with and without what is optional, say.
CALLS_PER_OPERATOR = 2

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments of tritonq's operators."""

    def __init__(self, calls: dict[str, dict[str, Call]]) -> None:
        super().__init__()
        self.calls = calls

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            # Graphs call what writes to its arguments through such an operator, whose kernel calls it in turn.
            with self:
                return func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd](*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(NAMESPACE):
            # Copied before the call, which may write to them.
            copied = torch.utils._pytree.tree_map_only(Tensor, torch.clone, (args, kwargs or {}))
            seen = self.calls.setdefault(name, {})
            if len(seen) < CALLS_PER_OPERATOR:
                seen.setdefault(described((args, kwargs)), copied)
        return func(*args, **(kwargs or {}))


def described(arguments: Any) -> str:
    """Text that is the same for calls of one kind: dtypes and dimensions, and all that is no tensor."""
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return " ".join(f"{x.dtype}{x.dim()}" if isinstance(x, Tensor) else type(x).__name__ for x in leaves)


class Net(nn.Module):
    """A convolution with BatchNorm and ReLU, a residual addition and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def images() -> Tensor:
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def compiled(function: Callable[..., Any], calls: dict[str, dict[str, Call]]) -> Callable[..., Any]:
    """``function`` compiled to graphs, forward and backward, which run under a `Recorder`."""

    def interpreted(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()
            with Recorder(calls):
                return graph(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    backend = aot_autograd(fw_compiler=interpreted, bw_compiler=interpreted)
    return torch.compile(function, backend=backend, dynamic=False)


def run_models(calls: dict[str, dict[str, Call]]) -> None:
    """Run a training step and eval of each scheme of quantization, and of its converted model."""
    for preset in ("tensorrt", "megengine_tqt", "f8net"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tritonq.prepare_qat(Net(), qconfig=tritonq.get_qconfig(preset), example_inputs=images()).train()
        model(images()).sum().backward()
        step = compiled(model, calls)
        F.cross_entropy(step(images()), torch.arange(4) % 3).backward()
        model.eval()
        with torch.no_grad():
            step(images())
            if preset == "f8net":
                compiled(tritonq.convert(model), calls)(images())


def run_functions(calls: dict[str, dict[str, Call]]) -> None:
    """Run observers by themselves, and the operators that exports trace."""
    scale, zero = torch.full((2,), 0.1), torch.zeros(2, dtype=torch.int8)
    histogram = tritonq.HistogramObserver()
    functions = (
        tritonq.MinMaxObserver(),
        histogram,
        # These two run where ranks share their statistics.
        lambda x: implementation("min_max", x).min_max(x, 1)[:2],
        lambda x: implementation("histogram", x).prefix_histogram(x, histogram.prefix_bins, None)[:3],
        lambda x: onnx_ops.quantize_dequantize(x, scale, zero, -128, 127, 1, False, ""),
        lambda x: onnx_ops.dequantize(x.to(torch.int8), scale, zero, 1),
    )
    torch._dynamo.reset()
    for function in functions:
        compiled(function, calls)(images())
    compiled(histogram.calculate_qparams, calls)()


@cache
def recorded() -> dict[str, dict[str, Call]]:
    """Return calls of every operator that the models and functions above run."""
    calls: dict[str, dict[str, Call]] = {}
    run_models(calls)
    run_functions(calls)
    return calls


def operators() -> list[str]:
    """Return the operators that torch's registry has."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE))


@pytest.mark.parametrize("name", operators())
def test_opcheck(name: str) -> None:
    """Schema, fake implementation, autograd registration and tracing agree with what the operator does."""
    calls = recorded().get(name)
    assert calls, f"no graph of this file calls {name}: add a model or function that does"
    operator = getattr(torch.ops.tritonq, name.removeprefix(NAMESPACE)).default
    for args, kwargs in calls.values():
        opcheck(operator, args, kwargs)


def test_a_wrong_fake_implementation_is_seen() -> None:
    """The check bites: a planted operator whose fake result has another dtype."""
    with torch.library._scoped_library("tritonq_planted", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CPU")
        library.impl("double", lambda x: torch.empty_like(x, dtype=torch.int32), "Meta")
        with pytest.raises(Exception, match="are not equal"):
            opcheck(torch.ops.tritonq_planted.double.default, (torch.ones(3),))
