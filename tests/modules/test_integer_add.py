"""Additions in eval mode: of summands behind a ReLU, and the links that prepared models keep."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import tritonq
from runtime_nodes import run_node
from tritonq.deploy.modules import Quantizer
from tritonq.quantized_type import QINT8


def test_summands_behind_a_relu_as_onnx_runtime_adds_them():
    """Deployed, they begin at the code of zero, and the roundings of the sum depend on it."""
    generator = torch.Generator().manual_seed(2)
    u, v = torch.cartesian_prod(torch.arange(128), torch.arange(256)).unbind(1)
    turned = 0
    for _ in range(20):
        scales = (torch.rand(3, generator=generator) * 0.04 + 0.01).tolist()
        add = tritonq.nn.Add(math.inf)
        a, b, add.activation_post_process = (
            Quantizer(QINT8, torch.tensor([scale]), torch.zeros(1, dtype=torch.int32)) for scale in scales
        )
        relu = nn.ReLU()
        relu.activation_post_process = a
        values = (u * a.scale, (v - 128) * b.scale)
        summed = run_node("QLinearAdd", [u.to(torch.uint8), v.to(torch.uint8)], scales, (0, 128, 0))
        expected = summed.clamp(max=127).int()
        codes = []
        for producer in (a, relu):
            add.set_producers(producer, b)
            codes.append((add.eval()(*values) / add.activation_post_process.scale).round().int())
        assert torch.equal(codes[1], expected)
        turned += int((codes[0] != expected).sum())
    assert turned, "these scales have no tie that the offsets turn over"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv1(x)
        return torch.relu(x + self.conv2(x))


@pytest.fixture
def prepared():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = tritonq.prepare_qat(Residual(), example_inputs=x)
    model(x)
    return model, x


def test_preparation_tells_an_addition_where_its_summands_come_from(prepared):
    model, _ = prepared
    expected = (model.conv1.activation_post_process, model.conv2.activation_post_process)
    assert model.add.input_quantizers == expected
    assert not any("input" in name for name in model.add.state_dict())


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.right, self.pool = nn.Conv2d(3, 4, 1), nn.MaxPool2d(1)

    def forward(self, x):
        return self.pool(self.left(x)) + self.right(x)


def test_additions_know_which_summands_come_out_of_a_relu(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    model = tritonq.prepare_qat(TwoBranches(), example_inputs=x)
    model(x)
    converted = tritonq.convert(model.eval())
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", TwoBranches())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), converted, loaded):
        assert twin.add.after_relu == (True, False)
        assert torch.equal(twin(x), model(x))


def test_links_survive_copies_conversion_and_files(prepared, tmp_path):
    model, x = prepared
    model.eval()
    converted = tritonq.convert(model)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Residual())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), converted, copy.deepcopy(converted), loaded]
    for twin in twins:
        expected = (twin.conv1.activation_post_process, twin.conv2.activation_post_process)
        assert twin.add.input_quantizers == expected
        assert torch.equal(twin(x), model(x))


def test_the_gradient_is_that_of_the_sum(prepared):
    model, x = prepared
    add = model.eval().add
    a = model.conv1(x).detach().requires_grad_()
    b = model.conv2(a).detach().requires_grad_()
    add(a, b).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert set(a.grad.unique().tolist()) <= {0.0, 1.0}
    assert a.grad.any()


def test_a_sum_whose_grids_are_unknown_is_added_in_float(prepared):
    model, x = prepared
    add = model.eval().add
    a = model.conv1(x)
    b = model.conv2(a)
    exact = add(a, b)
    assert torch.equal(exact, model(x))
    add.set_input_quantizers(None, None)
    assert (add(a, b) - exact).abs().max() <= 1.001 * add.activation_post_process.scale
