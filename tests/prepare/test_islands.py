"""Where tensors at the ends of softmax and norms are rounded, as a qconfig's ``islands`` says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from qat_models import train
from tritonq.switched_quantizer import SwitchedQuantizer

WIDTH, TOKENS = 16, 9


class Block(nn.Module):
    """A transformer's block, with attention by hand or by torch's function."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand, self.norm = by_hand, nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).reshape(-1, TOKENS, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.by_hand:
            y = ((q @ k.transpose(-2, -1)) * 0.35).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(-1, TOKENS, WIDTH))
        return x + self.mlp(x)


def trained(model, x, islands):
    qconfig = tritonq.get_qconfig()._replace(islands=islands)
    return train(tritonq.prepare_qat(model, example_inputs=x, qconfig=qconfig), x)


def off_grid(read, prepared):
    """Whether elements of a tensor are none of a hundred multiples of any quantizer's scale."""
    quantizers = [module for module in prepared.modules() if isinstance(module, SwitchedQuantizer)]
    steps = [read / module.scale for module in quantizers if module.scale.numel() == 1]
    return all((step - step.round()).abs().max() > 0.1 for step in steps)


@pytest.mark.parametrize("islands", [None, "float"])
def test_attention_agrees_in_onnx_runtime_with_the_softmax_s_scores_rounded_or_not(islands, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, TOKENS, 8)
    model = nn.Sequential(nn.Linear(8, WIDTH), Block(True), Block(False), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))
    prepared = trained(model, x, islands)
    read = {}
    for name in ("1.mlp.2", "3"):
        prepared.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(x), prepared(x))
    # The last sum is read by a LayerNorm alone, the first layer of the MLP by a GELU.
    assert all(off_grid(tensor, prepared) == (islands == "float") for tensor in read.values())
    tritonq.export_onnx(converted, tmp_path / "model.onnx", x)
    assert tritonq.verify(prepared, tmp_path / "model.onnx", [x]).agrees()
    found = optimised_kinds(tmp_path / "model.onnx")
    scores, values = ("MatMulIntegerToFloat", "QLinearMatMul") if islands == "float" else ("QLinearMatMul",) * 2
    assert found[scores] + found[values] == (4 if scores != values else 8)
    assert found["QLinearMatMul"] == (2 if islands == "float" else 4)
    assert found["QGemm"] == 10
    assert not {"MatMul", "Gemm"} & set(found)


class Normed(nn.Module):
    """A norm that nothing quantized reads or feeds directly."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last((self.norm(torch.cos(self.first(x))) + 0.5).exp())


@pytest.mark.parametrize(("islands", "count"), [(None, 1), ("rounded", 4)])
def test_ends_of_islands_are_rounded_where_that_is_asked_for(islands, count, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    prepared = trained(Normed(), x, islands)
    names = [name for name, module in prepared.named_modules() if isinstance(module, tritonq.FakeQuantize)]
    at_ends = [name for name in names if not name.startswith("last")]
    # Behind the exponential, which the last layer reads; further at both ends of the second norm and behind the first.
    assert len(at_ends) == count
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(x), prepared(x))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", x)
    assert tritonq.verify(prepared, tmp_path / "model.onnx", [x]).agrees()


def test_scores_that_a_scale_and_a_mask_alone_change_are_not_rounded_again():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(TOKENS, 2)
            self.register_buffer("mask", torch.full((TOKENS, TOKENS), -torch.inf).triu(1))

        def forward(self, x):
            return self.last(((self.q(x) @ self.k(x).transpose(1, 2)) * 0.3 + self.mask).softmax(-1))

    x = torch.randn(2, TOKENS, 8)
    prepared = trained(Masked(), x, "rounded")
    weights = []
    prepared.last.register_forward_pre_hook(lambda _, args: weights.append(args[0]))
    prepared(x)
    assert not weights[0].triu(1).any()


def test_tensorrt_reads_scores_in_float():
    assert tritonq.get_qconfig("tensorrt").islands == "float"
