"""Memory that CPU operators write temporaries to: what may lie in it, and that nothing returned or saved does."""

import threading

import pytest
import torch
from torch import nn

import tritonq
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_that_lasts_lies_in_it(layout, dtype):
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 160, 3, padding=1))
    model = nn.Sequential(*(layer for conv in convolutions for layer in _block(conv)))
    x = torch.randn(_LARGE).contiguous(memory_format=layout)
    steps = []
    for spoil in (False, True):
        torch.manual_seed(1)
        prepared = tritonq.prepare_qat(model.to(dtype=torch.float32), example_inputs=(x,), inplace=False).train()
        if dtype == torch.float64:
            prepared.double()
        mine = x.to(torch.float32 if dtype == torch.bfloat16 else dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = prepared(mine)
        loss = y.float().square().sum()
        if spoil:
            _spoil()
        loss.backward()
        results = [y, mine.grad, *(parameter.grad for parameter in prepared.parameters())]
        assert not _addresses() & {result.untyped_storage().data_ptr() for result in results}
        if spoil:
            _spoil()
        steps.append([result.detach().clone() for result in results])
    assert _addresses()
    for plain, spoiled in zip(*steps, strict=True):
        assert torch.equal(plain, spoiled)


def _block(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()
