"""Every pair of codes through each class of operation, on scales that tie: eval mode, converted and file agree."""

import random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from qat_models import after_one_batch


class Operations(nn.Module):
    """Two inputs that pass through layers as they are, and what is made of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        self.behind_relu = nn.Conv2d(1, 1, 1, bias=False)
        self.clipped = nn.ModuleList(nn.Conv2d(1, 1, 1, bias=False) for _ in range(4))
        for layer in (*self.children(), *self.clipped):
            if layer is not self.clipped:
                nn.init.ones_(layer.weight)
        # Whatever something quantized reads is quantized.
        self.readers = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(14))
        self.of_means = nn.ModuleList([nn.Linear(1, 1), nn.Conv1d(1, 1, 1)])
        self.hardtanh = nn.Hardtanh(-0.4, 1.1)

    def forward(self, a, b):
        one, two, three, four = (layer(x) for layer, x in zip(self.clipped, (a, a, b, b), strict=True))
        behind = (one.clamp(-0.7, 0.9), two.clamp(max=1.3), self.hardtanh(three), F.relu(four).clamp_max(0.8))
        a, b = self.first(a), self.second(b)
        c = F.relu(self.behind_relu(b))
        joins = (F.relu(a + b), a + c, c - a, F.relu(a - b), a * b, F.relu6(a * c), torch.cat([a, c], 1))
        sums = (F.avg_pool2d(a, 2), F.avg_pool2d(c, 3, 2, 1, count_include_pad=False), b.mean((2, 3)), b.mean(3))
        functions = (F.silu(a), F.hardswish(b), F.hardsigmoid(a), F.leaky_relu(b, 0.25), torch.tanh(c), F.gelu(b))
        clips = (F.hardtanh(a), b.clamp_min(-0.6))
        many = (*sums[:2], *functions, *clips, *behind)
        read = [layer(x) for layer, x in zip(self.readers, many, strict=True)]
        return joins, read, [layer(x) for layer, x in zip(self.of_means, sums[2:], strict=True)]


def with_ties(model, seed):
    """Set scales to small multiples of powers of two, and zero points to ends and middle: most results are ties."""
    chosen = random.Random(seed)
    steps = defaultdict(lambda: chosen.choice([1, 1, 3, 5, 1.1]) * 2.0 ** -chosen.randint(3, 6))
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, tritonq.FakeQuantize) and not name.endswith("weight_fake_quant"):
            child = name.split(".")[0]
            is_input = child in ("first", "second", "behind_relu", "clipped")
            # One for a layer's input and output, so that every code passes.
            quantizer.scale.fill_(steps[child] * (1 if is_input else chosen.choice([1, 2, 4, 6])))
            if not quantizer.qtype.symmetric:
                quantizer.zero_point.fill_(128 if is_input else chosen.choice([0, 3, 128, 255]))


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers only where")  # those of preset tensorrt
@pytest.mark.parametrize(("preset", "seed"), [("onnxruntime", 0), ("onnxruntime", 1), ("tensorrt", 2)])
def test_no_code_differs(preset, seed, tmp_path):
    torch.manual_seed(0)
    example = torch.randn(2, 1, 1, 8, 8).unbind(0)
    model = after_one_batch(Operations(), *example, qconfig=tritonq.get_qconfig(preset), warn=False)
    with_ties(model, seed)
    codes = torch.arange(256.0) - 128
    pairs = torch.meshgrid(
        codes * model.first.input_quantizer.scale, codes * model.second.input_quantizer.scale, indexing="ij"
    )
    a, b = (values.view(1, 1, 256, 256) for values in pairs)
    converted = tritonq.convert(model)
    assert tritonq.verify(model, converted, [(a, b)]).total.differing == 0
    tritonq.export_onnx(converted, tmp_path / "m.onnx", (a, b), target="onnxruntime")
    report = tritonq.verify(model, tmp_path / "m.onnx", [(a, b)])
    assert [layer for layer in report.layers if layer.differing and not layer.island] == []
    assert preset == "tensorrt" or report.total.differing == 0
