"""Memory that CPU operators write temporaries to: what may lie in it, and that nothing returned or saved does."""

import threading

import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT64_SUMS, assert_close
from tritonq.reference import scratch
from tritonq.reference.scratch import borrow, is_dense

_LARGE = (8, 64, 32, 32)


def _spoil() -> None:
    for buffer in scratch._slots.buffers.values():
        buffer.fill_(torch.nan)


def _addresses() -> set[int]:
    return {buffer.untyped_storage().data_ptr() for buffer in scratch._slots.buffers.values()}


def test_the_same_memory_again():
    like = torch.empty(_LARGE)
    first, second = borrow("local", like), borrow("local", like)
    assert first.data_ptr() == second.data_ptr() != borrow("product", like).data_ptr()
    assert borrow("local", like[:5]).data_ptr() == first.data_ptr()
    assert borrow("local", like, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shape_and_strides(layout):
    like = torch.empty(_LARGE).contiguous(memory_format=layout)
    assert borrow("local", like).stride() == like.stride()
    assert is_dense(like)


def test_where_allocating_is_as_good():
    like = torch.empty(_LARGE)
    assert borrow("local", like[:, :1]) is None  # small
    assert borrow("local", like[:, ::2]) is None  # not dense
    assert borrow("local", like.to("meta")) is None
    with torch._subclasses.FakeTensorMode() as mode:
        assert borrow("local", mode.from_tensor(like)) is None


def test_what_is_very_large_is_not_kept(monkeypatch):
    like = torch.empty(_LARGE)
    monkeypatch.setattr(scratch, "_MOST_BYTES", like.nbytes)
    assert borrow("local", like) is not None
    assert borrow("local", like, torch.float64) is None


def test_a_first_call_in_inference_mode_leaves_memory_that_others_can_write():
    def work() -> None:
        like = torch.ones(_LARGE)
        with torch.inference_mode():
            borrow("local", like)
        torch.mul(like, 2, out=borrow("local", like))
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)  # starts without memory of its own
    thread.start()
    thread.join()
    assert done


class Block(nn.Module):
    """Activations and weights large enough for scratch memory, and a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Conv2d(64, 128, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.same = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.widen(x)
        return torch.relu(self.same(x) + x)


def _step(model, x, dtype, before_backward=lambda: None):
    """One training step: the result and all gradients."""
    prepared = tritonq.prepare_qat(model, example_inputs=(x,), inplace=False).train()
    mine = x.clone()
    if dtype == torch.float64:
        prepared, mine = prepared.double(), mine.double()
    mine.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = prepared(mine)
    loss = y.float().square().sum()
    before_backward()
    loss.backward()
    return [y, mine.grad, *(parameter.grad for parameter in prepared.parameters())]


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_that_lasts_lies_in_it(layout, dtype):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(_LARGE).contiguous(memory_format=layout)
    plain = _step(model, x, dtype)
    results = _step(model, x, dtype, before_backward=_spoil)
    assert _addresses()
    assert not _addresses() & {result.untyped_storage().data_ptr() for result in results}
    _spoil()
    for expected, found in zip(plain, results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_alive_at_once_lies_apart(layout, monkeypatch):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(_LARGE).contiguous(memory_format=layout)
    results = _step(model, x, torch.float64)
    monkeypatch.setattr(scratch, "_LEAST_BYTES", 1 << 60)
    for expected, found in zip(_step(model, x, torch.float64), results, strict=True):
        assert_close(expected, found, FLOAT64_SUMS, size=float(expected.detach().abs().max()))
