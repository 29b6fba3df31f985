"""Memory held between forward and backward: QAT against float training. Deterministic."""

import pytest
import torch

import tritonq
from saved_bytes import saved_bytes
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from vision_models import torchvision_model

SHAPE = (16, 3, 96, 96)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("name", "pairs", "codes", "limit"),
    [
        *(("resnet18", 20, False, 1.01), ("resnet18", 20, True, 0.76)),
        # Float training keeps the BatchNorm's input and output for a ReLU6, and the result of that.
        *(("mobilenet_v2", 52, False, 0.7), ("mobilenet_v2", 52, True, 0.44)),
    ],
)
def test_it_is_no_more_than_in_float_training(name, pairs, codes, limit, memory_format):
    torch.manual_seed(0)
    model = torchvision_model(name).train().to(memory_format=memory_format)
    x = torch.randn(SHAPE).to(memory_format=memory_format)
    qat = tritonq.prepare_qat(model, example_inputs=(x[:1],))
    layers = [m for m in qat.modules() if isinstance(m, QATBatchNormLayer)]
    assert len(layers) == pairs
    for layer in layers:
        layer.save_input_codes = codes
    ratio = saved_bytes(qat, x) / saved_bytes(model, x)
    assert ratio <= limit, f"{ratio:.4f} times float training"
    assert ratio > 0.9 * limit, "something is missing from the count"
