"""`tritonq.testing.check_quantizer`: tritonq's own quantizers pass, broken ones fail by the name of the check."""

from __future__ import annotations

import pytest
import torch

import tritonq
from tritonq.testing import QuantizerCheckError, check_quantizer

SYMMETRIC = dict(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
ROWS = tritonq.FakeQuantize.with_args(
    observer=tritonq.PerChannelMinMaxObserver, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
)


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (tritonq.FakeQuantize, False),
        (tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver), False),
        (tritonq.LearnedStepFakeQuantize.with_args(**SYMMETRIC), False),
        (tritonq.TrainedThresholdFakeQuantize, False),
        (tritonq.ClippedFakeQuantize, False),
        (ROWS, True),
        (ROWS.with_args(observer=tritonq.MovingAveragePerChannelMinMaxObserver), True),
        (tritonq.FakeQuantize.with_args(observer=tritonq.InterpolatingHistogramObserver, **SYMMETRIC), False),
        (tritonq.FakeQuantize.with_args(rule="torch_v1"), False),
        (tritonq.LearnedStepFakeQuantize.with_args(init="lsq", dtype=tritonq.QuantizedType.of(4, axis=0)), True),
        (tritonq.get_qconfig("w4a8_g32").weight, True),
        (tritonq.get_qconfig("onnxruntime").activation, False),
        (tritonq.torch_ao.default_fixed_qparams_range_neg1to1_fake_quant, False),
    ],
)
def test_own_classes_pass(make, weight):
    names = check_quantizer(make, weight=weight, compiled=False, exported=False)
    assert names[-1] == "convert"


def test_everything_of_the_default():
    assert check_quantizer(tritonq.FakeQuantize)[-2:] == ["compile", "onnx"]


class Dithered(tritonq.FakeQuantize):
    def quantize(self, x):
        if self.training:
            x = x + self.fake_quant_enabled * (torch.rand_like(x) - 0.5) * self.scale
        return super().quantize(x)


def test_random_numbers_in_training_compile_and_leave_the_users_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert check_quantizer(Dithered, exported=False)[-1] == "compile"
    assert torch.equal(torch.rand(1), expected)


class ObservesInEval(tritonq.FakeQuantize):
    def forward(self, x, observe=True):
        self.observe(x)
        return self.quantize(x)


class DeploysAnotherScale(tritonq.FakeQuantize):
    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return tritonq.qparams.QParams(scale * 1.01, zero_point)


class ForgetsItsScale(tritonq.FakeQuantize):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = torch.ones(1)


class StopsGradients(tritonq.FakeQuantize):
    def quantize(self, x):
        return super().quantize(x.detach()) + 0 * x


class IgnoresItsSwitch(tritonq.FakeQuantize):
    def disable_fake_quant(self):
        pass


class StartsAtInfinity(tritonq.FakeQuantize):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("worst", torch.tensor(float("inf")))


class FollowsCasts(tritonq.FakeQuantize):
    def _apply(self, fn, recurse=True):
        return torch.nn.Module._apply(self, fn, recurse)


@pytest.mark.parametrize(
    ("broken", "check", "reason"),
    [
        (ObservesInEval, "switches", "in eval mode a batch changes its state"),
        (DeploysAnotherScale, "values", "of calculate_qparams"),
        (ForgetsItsScale, "copies", "state dict gives other results"),
        (StopsGradients, "gradient", "no gradient anywhere"),
        (IgnoresItsSwitch, "switches", "does not pass its input"),
        (StartsAtInfinity, "averages", "worst"),
        (FollowsCasts, "precision", "BFloat16"),
    ],
)
def test_broken_ones_fail_by_name(broken, check, reason):
    with pytest.raises(QuantizerCheckError, match=f"{broken.__name__} breaks its contract") as raised:
        check_quantizer(broken, compiled=False, exported=False)
    assert reason in raised.value.failed[check]


def test_what_is_no_quantizer_fails_at_once():
    with pytest.raises(QuantizerCheckError, match="it has no qtype, calculate_qparams"):
        check_quantizer(torch.nn.Identity)
