"""Tensors of integers, which no quantizer rounds, in training and in eval mode."""

import pytest
import torch
from torch import nn

import tritonq

QUANTIZERS = {
    "ranges": lambda: tritonq.FakeQuantize(dtype=torch.qint8),
    "learned": tritonq.LearnedStepFakeQuantize,
    "floats": lambda: tritonq.FloatFakeQuantize("fp8_e4m3"),
    "blocks": lambda: tritonq.FloatFakeQuantize("mxfp8"),
    "fixed": tritonq.FixedPointFakeQuantize,
}


@pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)
def test_both_modes_refuse_integers(make):
    quantizer = make()
    quantizer(torch.linspace(-1, 1, 5))
    state = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for training in (True, False):
        quantizer.train(training)
        with pytest.raises(TypeError, match=r"must be float32, float16, bfloat16 or float64, got torch\.int32"):
            quantizer(torch.arange(5, dtype=torch.int32))
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantizer.state_dict().items())


def test_fixed_point_clips_no_integers():
    quantizer = tritonq.FixedPointFakeQuantize()
    quantizer(torch.linspace(-1, 1, 5))
    quantizer.phase = "floating"
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        quantizer.eval()(torch.arange(5, dtype=torch.int32))


def test_converted_quantizers_refuse_integers():
    qat = tritonq.prepare_qat(nn.Sequential(nn.Linear(4, 4)), example_inputs=torch.randn(2, 4))
    qat.train()(torch.randn(8, 4))
    converted = tritonq.convert(qat.eval())
    for model in (qat, converted):
        with pytest.raises(TypeError, match=r"got torch\.int64"):
            model(torch.ones(2, 4, dtype=torch.int64))


class Encoder(nn.Module):
    """Indices, positions that are computed, and a mask of bools: none of them is rounded."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 8), nn.Embedding(6, 8), nn.Linear(8, 4)

    def forward(self, words):
        x = self.words(words) + self.places(torch.arange(words.shape[1]) + 1)
        return self.head(x.masked_fill((words == 0).unsqueeze(-1), 0.0))


@pytest.mark.parametrize("preset", ["onnxruntime", "lsq_w8a8", "fp8_e4m3"])
def test_indices_and_masks_reach_no_quantizer(preset):
    words = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(0))
    qat = tritonq.prepare_qat(Encoder(), qconfig=tritonq.get_qconfig(preset), example_inputs=words)
    qat.train()(words).sum().backward()
    assert torch.equal(tritonq.convert(qat.eval())(words), qat(words))
