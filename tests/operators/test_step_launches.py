"""How many launches a training step takes, and how many bytes they move, torch's own between the convolutions included.

The cost of one Conv-BN-ReLU is that of a model of four of them less that of a model of three.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import tritonq
from step_log import Launched, StepLog, autocast, on_meta

FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (32, 64, 56, 56)
# The convolution, and the two of its backward.
CONVOLUTIONS = ("convolution", "convolution_backward")
# On the meta device torch 2.11 gives the gradient of a channels_last input the other layout, so that it is copied.
EXTRA = ("copy_",) if torch.__version__.startswith("2.11.") else ()


@cache
def trained(layers: int, preset: str) -> nn.Module:
    """Return a model of Conv-BN-ReLU that has trained for a step."""
    channels = SHAPE[1]
    float_model = nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(layers)
        )
    )
    x = torch.randn(2, channels, 6, 6)
    model = tritonq.prepare_qat(float_model, qconfig=tritonq.get_qconfig(preset), example_inputs=x).train()
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    return model


def step_of(layers: int, preset: str, memory_format: torch.memory_format, dtype: torch.dtype | None) -> list[Launched]:
    """Return what one step launches."""
    model = on_meta(copy.deepcopy(trained(layers, preset)), memory_format)
    x, log = torch.empty(SHAPE, device="meta").to(memory_format=memory_format), StepLog()
    with log.kernels(), autocast(dtype), log:
        model(x).sum(dtype=torch.float32).backward()
    return [launch for launch in log.launches if launch.name not in EXTRA]


def layer_cost(preset: str, memory_format: torch.memory_format, dtype: torch.dtype | None) -> tuple[Counter[str], int]:
    """Return what one layer adds: its launches by name, and the bytes that all but its convolutions move."""
    three, four = (step_of(layers, preset, memory_format, dtype) for layers in (3, 4))
    launches = Counter(launch.name for launch in four)
    launches.subtract(launch.name for launch in three)
    moved = [sum(launch.bytes for launch in step if launch.name not in CONVOLUTIONS) for step in (three, four)]
    return +launches, moved[1] - moved[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("preset", ["tensorrt", "onnxruntime"])
def test_launches_and_bytes_of_a_layer(preset: str, layout: str, dtype: torch.dtype | None) -> None:
    launches, moved = layer_cost(preset, FORMATS[layout], dtype)
    assert launches["convolution"] == 1
    assert launches["convolution_backward"] == 2
    assert launches.total() <= 16, launches
    # Per element: statistics read the output of the convolution, the tail reads and writes; codes are made and restored
    # (one byte each); backward, two passes read two tensors and one writes.
    size = (dtype or torch.float32).itemsize
    per_element = (1 + 2 + 1 + 1 + 2 + 3) * size + 2
    # The weight and its codes, made twice; its gradient, that of the codes, and the weight once more. Vectors and
    # partial results besides.
    weight = SHAPE[1] * SHAPE[1] * 9
    small = (2 * (4 + size) + 4 + size + 4) * weight + 2**18
    assert moved <= per_element * torch.Size(SHAPE).numel() + small, (moved, launches)


def test_a_copy_too_many_is_counted() -> None:
    """The bound on bytes bites: one tensor copied once more passes it."""
    x, log = torch.empty(4, 3, device="meta"), StepLog()
    with log.kernels(), log:
        x.to(torch.bfloat16).view(12)
        x.add_(1)
        with pytest.raises(RuntimeError):
            x.sum().item()
    assert log.launches == [Launched("_to_copy", 72), Launched("add_", 96), Launched("sum", 52)]
