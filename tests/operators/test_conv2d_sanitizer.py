"""The folded convolution under triton-viz's sanitizer: nothing outside its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_conv_bn_sanitizer import symbolic_trace, trace  # noqa: F401 (fixtures)
from test_sanitizer import traced

from tritonq.grid import Grid
from tritonq.qparams import QUINT8

pytestmark = pytest.mark.sanitizer

# channels, outs, groups, kernel
CONVOLUTIONS = [(5, 3, 1, 3), (19, 18, 1, 1), (6, 4, 2, 2), (5, 10, 5, 3)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonq.kernels import conv2d
    from tritonq.kernels.conv_tile import ConvTile

    # Three sizes: the sanitizer takes ranges of one size for one and the same.
    monkeypatch.setattr(conv2d, "_default_tile", lambda *_: ConvTile(64, 16, 32, 4, 1))


def run(channels: int, outs: int, groups: int, kernel: int, channels_last: bool) -> None:
    from tritonq.kernels import conv2d

    x = torch.randn(2, channels, 4, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = torch.randn(outs, channels // groups, kernel, kernel)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    grid = Grid(one, zero, QUINT8, torch.ones(1, dtype=torch.uint8))
    geometry = ((2, 1), (1, 2), (1, 2), groups)
    conv2d.conv2d(x, weight, torch.ones(outs), *geometry, 1.5, grid)
    bias = torch.ones(outs, dtype=torch.int32)
    conv2d.integer_conv2d(x, weight, bias, torch.ones(outs), Grid(one, None, QUINT8), torch.float32, *geometry)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_stays_inside(
    convolution: tuple[int, int, int, int],
    channels_last: bool,
    trace: Callable[[Any], Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import conv2d

    traced(trace, conv2d, monkeypatch)
    run(*convolution, channels_last)


def test_finds_a_planted_access_out_of_bounds(
    trace: Callable[[Any], Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import conv2d
    from tritonq.kernels.conv_tile import ConvGeometry

    traced(trace, conv2d, monkeypatch)
    x, weight, geometry = torch.randn(2, 5, 4, 5), torch.randn(3, 5, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1)

    def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
        conv2d._launch(x, weight, bias, None, None, y, geometry, None, None, None)

    launch(x, weight, torch.ones(3), torch.empty(2, 3, 4, 5))
    for arguments in (
        (x, torch.randn(3, 6, 3, 3), torch.ones(3), torch.empty(2, 3, 4, 5)),
        (x, weight, torch.ones(2), torch.empty(2, 3, 4, 5)),
        (torch.randn(3, 5, 4, 5), weight, torch.ones(3), torch.empty(2, 3, 4, 5)),
    ):
        with pytest.raises(SystemExit):
            launch(*arguments)
