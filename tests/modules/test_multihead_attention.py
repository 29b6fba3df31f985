"""torch's multi-head attention: computed by quantized operations, with the same parameters and results."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from tritonq.nn import MatMul, QATLayer
from tritonq.nn.attention import MultiheadAttention
from tritonq.prepare.forwards.open_attention import compute_openly

WIDTH, HEADS, TOKENS = 16, 2, 5
BOOL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * TOKENS, [False, False, False, True, True]])
CASES = {
    "plain": ({}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "weights of heads": ({}, {"average_attn_weights": False}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "masks": ({}, {"attn_mask": BOOL, "key_padding_mask": PADDING}),
    "float mask of each head": ({}, {"attn_mask": torch.linspace(-1, 1, 4 * TOKENS**2).view(4, TOKENS, TOKENS)}),
    "causal": ({}, {"attn_mask": BOOL, "is_causal": True}),
    "appended keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDING}),
    "other widths": ({"kdim": 6, "vdim": 7}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_torch_does(case):
    torch.manual_seed(0)
    made, called = CASES[case]
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **made})
    ours = copy.deepcopy(theirs)
    compute_openly(ours)
    assert type(ours) is MultiheadAttention
    key = torch.randn(2, TOKENS, made.get("kdim", WIDTH))
    value = torch.randn(2, TOKENS, made.get("vdim", WIDTH))
    inputs = [torch.randn(2, TOKENS, WIDTH), key, value]
    if made.get("batch_first") is False:
        inputs = [x.transpose(0, 1) for x in inputs]
    for found, expected in zip(ours(*inputs, **called), theirs(*inputs, **called), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours(*[x[0] for x in inputs])[0], theirs(*[x[0] for x in inputs])[0])


class Blocks(nn.Module):
    """Attention with weights that are returned, and torch's encoder layer, which has a fused path in eval mode."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(8, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.block = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.block(x))


def test_it_is_trained_and_converted_in_integers_with_its_own_keys(tmp_path):
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(3, TOKENS, 8)
    prepared = tritonq.prepare_qat(model, example_inputs=x, strict=True)
    assert type(model.attention) is nn.MultiheadAttention
    assert set(model.state_dict()) <= set(prepared.state_dict())
    products = [module for module in prepared.modules() if isinstance(module, MatMul)]
    layers = [module for module in prepared.modules() if isinstance(module, QATLayer)]
    assert len(products) == 4
    assert len(layers) == 2 * 4 + 4
    assert all(None not in product.input_quantizers for product in products)
    assert all(layer.input_quantizer is not None for layer in layers)
    before = model.attention.in_proj_weight.clone()
    optimizer = torch.optim.SGD(prepared.train().parameters(), 0.05)
    prepared(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    optimizer.step()
    assert not torch.equal(prepared.attention.in_proj_weight, before)
    prepared.eval()
    with torch.no_grad():
        expected = prepared(x)
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(x), expected)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", model)(x), expected)
    assert torch.equal(copy.deepcopy(prepared)(x), expected)


def test_a_rule_by_type_leaves_it_in_float():
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig()).set_object_type(nn.MultiheadAttention, None)
    prepared = tritonq.prepare_qat(Blocks(), example_inputs=torch.randn(3, TOKENS, 8), qconfig=mapping)
    assert not any(isinstance(module, MatMul) for module in prepared.modules())
    assert sum(isinstance(module, QATLayer) for module in prepared.modules()) == 4


class Inherits(nn.MultiheadAttention):
    """Adds a method, and computes as torch's class does."""

    def width_of_heads(self):
        return self.head_dim


class Own(nn.MultiheadAttention):
    """Computes by itself."""

    def forward(self, query, key, value):
        q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize(("kind", "layers"), [(Inherits, 4), (Own, 2)])
def test_subclasses_are_quantized_as_other_modules_are(kind, layers, tmp_path):
    def model():
        torch.manual_seed(0)
        made = Blocks()
        made.attention = kind(WIDTH, HEADS, batch_first=True)
        return made

    x = torch.randn(3, TOKENS, 8)
    prepared = tritonq.prepare_qat(model(), example_inputs=x, strict=True)
    assert isinstance(prepared.attention, kind)
    assert sum(isinstance(module, QATLayer) for module in prepared.attention.modules()) == layers
    prepared(x).square().mean().backward()
    expected = prepared.eval()(x)
    converted = tritonq.convert(copy.deepcopy(prepared))
    assert isinstance(converted.attention, kind)
    assert torch.equal(converted(x), expected)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", model())(x), expected)
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig()).set_object_type(kind, None)
    prepared = tritonq.prepare_qat(model(), example_inputs=x, qconfig=mapping)
    assert not any(isinstance(module, QATLayer) for module in prepared.attention.modules())


class Rescaled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        y, weights = super().forward(*args, **kwargs)
        return 2 * y, weights


def test_a_subclass_that_calls_the_forward_of_torch_keeps_it_in_float():
    model, x = Blocks(), torch.randn(3, TOKENS, 8)
    model.attention = Rescaled(WIDTH, HEADS, batch_first=True)
    compute_openly(model)
    assert type(model.attention) is Rescaled
    prepared = tritonq.prepare_qat(model, example_inputs=x, warn=False)
    reasons = {row.name: row.reason for row in tritonq.summary(prepared).in_float}
    read = "nothing calls it: multi_head_attention_forward in the forward of attention reads its parameters"
    assert reasons["attention.out_proj"] == read
