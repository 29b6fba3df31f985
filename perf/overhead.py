"""Python time per call, per layer and per launch: on a CPU with the launch stubbed out, on a GPU with it.

Run as ``python -m tritonq.perf.overhead``. What remains when a launch does nothing is what tritonq and autograd spend;
triton's own launcher comes on top of it, and shows on a GPU only (where this has not been run yet).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tritonq.perf import records
from tritonq.perf.case import Inputs, Step
from tritonq.perf.machine import device_slug, environment
from tritonq.perf.measure import Budget, interleave
from tritonq.perf.runner import default_results
from tritonq.perf.stats import Spread, speed_up
from tritonq.perf.table import duration

# Small enough for torch's operators to be all overhead, too.
_SHAPE = (4, 4)
_BUDGET = Budget(seconds=1.0, min_rounds=15)
_LIMITS = (-128, 127)
# What has no gradient.
_FORWARD_ONLY = ("one launch",)

Operators = Mapping[str, Callable[[Tensor], Tensor]]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write a results file."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.overhead", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: perf/results)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env = environment(device)
    label = f"overhead-{str(env['commit'])[:7]}{'-dirty' if env['dirty'] else ''}"
    with records.create((args.out or default_results()) / device_slug(device), label) as file:
        for record in measure(device):
            records.write(file, {**record, "environment": env})
            ratio = f"{1 / record['speed_up']:.1f} times torch" if "speed_up" in record else ""
            print(f"{record['case']:60} {record['implementation']:8} {duration(record['median_s']):>8}  {ratio}")
    print(f"\nwritten to {file.name}")
    return 0


def measure(device: torch.device, budget: Budget = _BUDGET) -> Iterator[records.Record]:
    """Yield a record of each operator, layer and launch, by each library; the baseline is torch's of the same name."""
    stub = "" if device.type == "cuda" else "/launch stubbed"
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(stubbed_launches())
        for name, operators in _operators(device).items():
            for backward in (False,) if name in _FORWARD_ONLY else (False, True):
                steps = {library: _step(operator, backward, device) for library, operator in operators.items()}
                times = interleave(steps, [{}], device, budget)
                case = f"overhead/{name}/{'forward+backward' if backward else 'forward'}{stub}"
                for library, seconds in times.items():
                    yield _record(case, library, seconds, times.get("torch"))


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """Send CPU tensors to the kernels, whose launches do nothing."""
    from triton.runtime.jit import JITFunction

    with (
        # Plain functions: calling a mock takes as long as what is timed.
        mock.patch("tritonq.backend._obstacle", new=_no_obstacle),
        mock.patch("tritonq.kernels.cached_launch.has_launches", new=_has_launches),
        mock.patch.object(JITFunction, "run", new=_no_launch),
    ):
        yield


def _no_obstacle(x: Tensor) -> None:
    """Return None in place of the function that keeps CPU tensors from kernels."""


def _has_launches(value: Tensor) -> bool:
    """Return True in place of the function that keeps launches on CPU tensors from being remembered."""
    return True


class _NoKernel:
    """Stands in for a compiled kernel."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., object]:
        return _no_launch


def _no_launch(*args: object, **kwargs: object) -> _NoKernel:
    """Do nothing in place of ``JITFunction.run`` and of the function that launches a compiled kernel."""
    return _NoKernel()


def _operators(device: torch.device) -> dict[str, Operators]:
    import tritonq
    from tritonq.observers import MovingAverageMinMaxObserver

    scale, zero_point = torch.tensor([0.05], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    scales, zero_points = scale.repeat(_SHAPE[0]), zero_point.repeat(_SHAPE[0])
    observer: dict[str, Any] = {
        "dtype": torch.quint8,
        "quant_min": 0,
        "quant_max": 255,
        "qscheme": torch.per_tensor_affine,
    }
    return {
        "fake_quantize_per_tensor_affine": {
            "torch": lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *_LIMITS),
            "tritonq": lambda x: tritonq.fake_quantize_per_tensor_affine(x, scale, zero_point, *_LIMITS),
        },
        "fake_quantize_per_channel_affine": {
            "torch": lambda x: torch.fake_quantize_per_channel_affine(x, scales, zero_points, 0, *_LIMITS),
            "tritonq": lambda x: tritonq.fake_quantize_per_channel_affine(x, scales, zero_points, 0, *_LIMITS),
        },
        "FakeQuantize": {
            "torch": _torch_ao_quantizer(observer).to(device),
            "tritonq": _seen(tritonq.FakeQuantize(MovingAverageMinMaxObserver, **observer)).to(device),
        },
        "ConvBnReLU2d": {"torch": _as_image(_float_layer().to(device)), "tritonq": _as_image(_layer().to(device))},
        "one launch": {"tritonq": _launch(scale)},
    }


def _float_layer() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1, bias=False), torch.nn.BatchNorm2d(1), torch.nn.ReLU())


def _layer() -> torch.nn.Module:
    """Return the layer in training, after a step with real launches."""
    import tritonq

    layer = tritonq.prepare_qat(_float_layer(), example_inputs=torch.ones(1, 1, *_SHAPE)).train()
    with tritonq.use_backend("torch"):
        layer(torch.linspace(-1, 1, 16).view(1, 1, *_SHAPE)).sum().backward()
    return layer


def _as_image(layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x.view(1, 1, *_SHAPE)).view(_SHAPE)


def _launch(scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a call of one kernel's launcher, which allocates the result, plans the launch and makes it."""
    from tritonq.grid import Grid
    from tritonq.kernels import fake_quant
    from tritonq.quantized_type import QINT8

    grid = Grid(scale, None, QINT8)
    return lambda x: fake_quant.fake_quantize(x, grid)


def _torch_ao_quantizer(arguments: dict[str, Any]) -> torch.nn.Module:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

    return FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver, **arguments)


def _seen(quantizer: torch.nn.Module) -> torch.nn.Module:
    """Let a quantizer observe once with real launches; with stubbed ones it would have seen nothing, and not round."""
    import tritonq

    with tritonq.use_backend("torch"):
        quantizer(torch.linspace(-1, 1, 16))
    return quantizer


def _step(operator: Callable[[Tensor], Tensor], backward: bool, device: torch.device) -> Step:
    x = torch.linspace(-1, 1, 16, device=device).view(_SHAPE).requires_grad_(backward)
    dy = torch.ones(_SHAPE, device=device)

    def forward(_: Inputs) -> tuple[Tensor, ...]:
        return (operator(x),)

    def forward_backward(_: Inputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(operator(x), x, dy)

    return forward_backward if backward else forward


def _record(case: str, library: str, seconds: list[float], baseline: list[float] | None) -> records.Record:
    spread = Spread.of(seconds)
    record = {
        "case": case,
        "family": "overhead",
        "implementation": library,
        "baseline": "torch",
        "status": "ok",
        "rounds": len(seconds),
        "median_s": spread.median,
        "p20_s": spread.p20,
        "p80_s": spread.p80,
        "time": records.utc_now(),
    }
    if baseline is not None:
        record["speed_up"] = speed_up(baseline, seconds).median
    return record


if __name__ == "__main__":
    sys.exit(main())
