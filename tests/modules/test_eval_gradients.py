"""Gradients and values that eval mode must not lose: of each parameter, trained alone, and of tables with a norm."""

import pytest
import torch
from torch import nn

import tritonq
from tolerances import LONG_SUMS, assert_close


@pytest.mark.parametrize("float_input", [False, True])
def test_a_bias_that_trains_alone_has_a_gradient(float_input):
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = tritonq.prepare_qat(net, example_inputs=x).train()
    model(x)
    for name, parameter in model.eval().named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    if float_input:
        tritonq.disable_fake_quant(model)
    model(x).sum().backward()
    assert model[2].bias.grad.tolist() == [64.0, 64.0]


class _Various(nn.Module):
    """Layers with and without BatchNorm, recurrent ones, operations, and a parameter that is an operand."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.pointwise, self.prelu = nn.Conv2d(4, 4, 1), nn.PReLU()
        self.hardswish, self.layer_norm = nn.Hardswish(), nn.LayerNorm(6)
        self.linear, self.lstm = nn.Linear(6, 2), nn.LSTM(2, 3, batch_first=True)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = torch.cat([self.prelu(self.pointwise(y)) + y * self.factor, y], 1)
        y = self.linear(self.layer_norm(self.hardswish(y)))
        return self.lstm(y.flatten(1, 2))[0]


@pytest.mark.parametrize(
    "preset", ["onnxruntime", "lsq_w8a8", "lsq_w4a4", "learned_bits_a8", "megengine_tqt", "bwn_w1a8"]
)
def test_each_parameter_that_trains_alone_has_the_gradient_that_it_has_among_all(preset):
    x = torch.randn(4, 3, 8, 8)
    model = tritonq.prepare_qat(_Various(), qconfig=tritonq.get_qconfig(preset), example_inputs=x).train()
    model(x)
    model.eval()
    model(x).square().sum().backward()
    parameters = dict(model.named_parameters())
    among_all = {name: parameter.grad for name, parameter in parameters.items()}
    assert not [name for name, gradient in among_all.items() if gradient is None]
    for name, parameter in parameters.items():
        model.requires_grad_(False)
        parameter.requires_grad_(True).grad = None
        model(x).square().sum().backward()
        assert_close(parameter.grad, among_all[name], LONG_SUMS)


def test_a_channel_that_is_switched_off_has_finite_gradients():
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig("lsq_w8a8"), example_inputs=x).train()
    model(x)
    with torch.no_grad():
        model[0].bn.weight[1] = 0
    model.eval()(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [tritonq.nn.Embedding, tritonq.nn.EmbeddingBag])
def test_the_largest_norm_scales_no_table_that_is_not_rounded_yet(kind):
    table = kind(5, 3, max_norm=0.1, qconfig=tritonq.default_embedding_qat_qconfig).eval()
    before = table.weight.detach().clone()
    with pytest.warns(UserWarning, match="observed nothing"):
        rows = table(torch.tensor([[1, 2]]))
    assert float(rows.norm(dim=-1).max()) < 0.101
    assert torch.equal(table.weight, before)
