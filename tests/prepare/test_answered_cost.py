"""What a forward that keeps its branches costs: the mode that answers its calls rests while layers compute."""

from __future__ import annotations

from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prepared_nets import X, conv
from tritonq.nn.forward_mode import ForwardMode, RestingModes
from tritonq.prepare import prepare_qat
from tritonq.prepare.forwards import answered
from tritonq.prepare.record.place import function_name


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, skips: bool = True) -> Tensor:
        return x + self.body(x) if skips else self.body(x)


class CallCount(ForwardMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_calls_of_layers_are_not_looked_at(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare_qat(Branches(), example_inputs=X).train(training)
    model(X)
    looked_at = []

    def name(frame: FrameType) -> str:
        looked_at.append(function_name(frame))
        return looked_at[-1]

    monkeypatch.setattr(answered, "function_name", name)
    model(X)
    # The addition, and what the modules between layers ask of a tensor.
    assert 1 <= len(looked_at) <= 6, looked_at


def test_modes_of_others_go_on_watching() -> None:
    class Others(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    outer, inner = CallCount(), CallCount()
    with outer, Others(), inner:
        with RestingModes():
            X + X
        assert seen == [torch.Tensor.add]
        assert outer.calls == 1  # behind a mode that is not to rest
        assert inner.calls == 0
        X + X
        assert inner.calls == 1


def test_modes_come_back_in_order_after_an_error() -> None:
    outer, inner = CallCount(), CallCount()
    with outer, inner:
        with pytest.raises(ZeroDivisionError), RestingModes():
            1 / 0  # noqa: B018
        X + X
    assert (outer.calls, inner.calls) == (1, 1)
