"""Memory held between forward and backward: QAT of a ResNet-18 against float training. Deterministic."""

import pytest
import torch
from torch import nn

import tritonq
from tritonq.nn.conv_bn import QATBatchNormLayer
from vision_models import torchvision_model

SHAPE = (16, 3, 96, 96)


def saved_bytes(model, x):
    """Bytes of the distinct tensors that autograd keeps, parameters aside."""
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # holding on to it keeps its address its own
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64))
    del loss
    return sum(size for size, _ in kept.values())


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = torchvision_model("resnet18").train()
    x = torch.randn(SHAPE)
    return model, tritonq.prepare_qat(model, example_inputs=(x[:1],)), x


@pytest.mark.parametrize(("codes", "limit"), [(False, 1.01), (True, 0.76)])
def test_resnet18_keeps_no_more_than_float_training(models, codes, limit):
    model, qat, x = models
    layers = [m for m in qat.modules() if isinstance(m, QATBatchNormLayer)]
    assert len(layers) == 20
    for layer in layers:
        layer.save_input_codes = codes
    ratio = saved_bytes(qat, x) / saved_bytes(model, x)
    assert ratio <= limit, f"{ratio:.4f} times float training"
    assert ratio > 0.5, "something is missing from the count"
