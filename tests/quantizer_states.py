"""Quantizer states as operators take them, in pairs that start alike."""

import torch

from tritonq.qparams import QuantizedType
from tritonq.reference.quantizer_state import QuantizerState


def quantizer_state(
    qtype: QuantizedType,
    channels: int = 1,
    *,
    device: str = "cpu",
    averaging: float | None = 0.1,
    copy_above: float | None = 1.2,
    rule: str = "torch",
    observing: bool = True,
    active: bool = True,
) -> QuantizerState:
    """A quantizer that has seen nothing yet."""
    shape = () if qtype.axis is None else (channels,)
    count = 1 if qtype.axis is None else channels
    return QuantizerState(
        torch.ones(count, device=device),
        None if qtype.fixed_zero_point == 0 else torch.zeros(count, dtype=torch.int32, device=device),
        torch.tensor([active], dtype=torch.uint8, device=device),
        qtype,
        torch.full(shape, torch.inf, device=device),
        torch.full(shape, -torch.inf, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.tensor([observing], dtype=torch.uint8, device=device),
        averaging,
        rule,
        1e-7,
        copy_above=copy_above,
    )


def moved(state: QuantizerState, device: str) -> QuantizerState:
    """The same with its tensors on ``device``."""
    return QuantizerState(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in state))


def assert_same_state(actual: QuantizerState, expected: QuantizerState) -> None:
    """Range, count and qparams are equal bit for bit."""
    actual, expected = moved(actual, "cpu"), moved(expected, "cpu")
    for name in ("min_val", "max_val", "nonfinite_count", "scale", "zero_point"):
        mine, other = getattr(actual, name), getattr(expected, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert torch.equal(mine, other), (name, mine, other)
