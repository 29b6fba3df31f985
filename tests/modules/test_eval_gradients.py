"""Gradients and values that eval mode must not lose: of a trained bias alone, and of tables with a largest norm."""

import pytest
import torch
from torch import nn

import tritonq


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


@pytest.mark.parametrize("kind", [tritonq.nn.Embedding, tritonq.nn.EmbeddingBag])
def test_the_largest_norm_scales_no_table_that_is_not_rounded_yet(kind):
    table = kind(5, 3, max_norm=0.1, qconfig=tritonq.default_embedding_qat_qconfig).eval()
    before = table.weight.detach().clone()
    with pytest.warns(UserWarning, match="observed nothing"):
        rows = table(torch.tensor([[1, 2]]))
    assert float(rows.norm(dim=-1).max()) < 0.101
    assert torch.equal(table.weight, before)
