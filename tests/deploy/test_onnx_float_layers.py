"""Layers that were left in float run in float in ONNX Runtime, whatever follows them."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import tritonq
from optimised_graph import optimised_graph

FOLLOWING = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.5),
    "batch norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    "leaky relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "prelu": nn.PReLU,
    "nothing": nn.Identity,
    "pool": lambda: nn.AvgPool2d(2, 1),
    "max pool and relu": lambda: nn.Sequential(nn.MaxPool2d(2, 1), nn.ReLU()),
}


class Mixed(nn.Module):
    """Float layers with what may follow them, between quantized ones."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 1), make(), nn.Conv2d(4, 4, 1)) for make in FOLLOWING.values()
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.up(x).mean((2, 3)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A trained model, its file, and the graph that ONNX Runtime makes of it."""
    torch.manual_seed(0)
    net, x = Mixed(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        net.blocks[0][0].weight[:, 0] *= 300  # what eight bits per tensor don't bear
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("onnxruntime"))
    for name in [*(f"blocks.{index}.0" for index in range(len(FOLLOWING))), "up.0", "head.0"]:
        mapping = mapping.set_module_name(name, None)
    qat = tritonq.prepare_qat(net, qconfig=mapping, example_inputs=x[:2]).train()
    for _ in range(2):
        qat(x)
    folder = tmp_path_factory.mktemp("mixed")
    tritonq.export_onnx(qat.eval(), folder / "m.onnx", x[:2])
    return qat, folder / "m.onnx", optimised_graph(folder / "m.onnx")


def test_float_layers_stay_in_float_and_the_others_run_in_integers(mixed):
    graph = mixed[2]
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Conv"] + counts["FusedConv"] == len(FOLLOWING)
    assert counts["QLinearConv"] == len(FOLLOWING) + 1
    assert counts["ConvTranspose"] == 1
    assert (counts["QGemm"], counts["Gemm"] + counts["FusedGemm"]) == (1, 1)


def values_of(weight):
    """What a weight holds, in order of size: ONNX Runtime arranges weights in blocks, which it fills up with zeros."""
    return weight[weight != 0].sort().values


def test_float_weights_are_not_quantized(mixed):
    qat, _, graph = mixed
    floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    held = [values_of(torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())) for tensor in floats]
    for name in ("blocks.0.0", "blocks.1.0", "up.0", "head.0"):
        weight = values_of(qat.get_submodule(name).weight.detach())
        assert any(torch.equal(other, weight) for other in held), name
