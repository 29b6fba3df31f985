"""Masks that are computed from a model's inputs hide what they mask, whatever their smallest number is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq

WIDTH, TOKENS = 16, 6
LOWEST = torch.finfo(torch.float32).min


def added(scores, hidden, value):
    """Scores with a mask that is `value` where a token is hidden."""
    return scores + torch.zeros(hidden.shape).masked_fill(hidden, value)[:, None]


def normalized(weights):
    return weights / weights.sum(-1, keepdim=True)


def less_its_sum(scores):
    return scores - scores.logsumexp(-1, keepdim=True)


def sharp_and_plain(scores):
    return scores.softmax(-1) + (scores * 2).softmax(-1)


# How scores, a mask of hidden tokens and a learned bias become weights.
FORMS = {
    "-infinity": lambda scores, hidden, bias: added(scores, hidden, float("-inf")).softmax(-1),
    "the lowest number": lambda scores, hidden, bias: added(scores, hidden, LOWEST).softmax(-1),
    "-10000, in front": lambda scores, hidden, bias: F.softmax(hidden[:, None] * -1e4 + scores, dim=-1),
    "a difference": lambda scores, hidden, bias: (scores - hidden[:, None].float() * 1e9).softmax(-1),
    "with a learned bias": lambda scores, hidden, bias: (scores + (bias + hidden[:, None] * LOWEST)).softmax(-1),
    "behind a learned bias": lambda scores, hidden, bias: added(scores + bias, hidden, LOWEST).softmax(-1),
    "two masks": lambda scores, hidden, bias: added(added(scores, hidden, -1e4), hidden, -1e4).softmax(-1),
    "a logarithm": lambda scores, hidden, bias: F.log_softmax(added(scores, hidden, LOWEST), -1).exp(),
    "a sigmoid": lambda scores, hidden, bias: added(scores, hidden, -1e4).sigmoid(),
    "a ReLU": lambda scores, hidden, bias: added(scores, hidden, float("-inf")).relu() / TOKENS,
    "an exponential": lambda scores, hidden, bias: normalized(added(scores, hidden, -1e9).exp()),
    "a sum of exponentials": lambda scores, hidden, bias: less_its_sum(added(scores, hidden, LOWEST)).exp(),
    "clipped scores": lambda scores, hidden, bias: added(scores, hidden, -1e9).clamp(-500, 500).softmax(-1),
    "two readers": lambda scores, hidden, bias: sharp_and_plain(added(scores, hidden, LOWEST)),
}


class Masked(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.bias = form, nn.Parameter(torch.randn(TOKENS, TOKENS))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, hidden):
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.out(FORMS[self.form](scores, hidden, self.bias) @ self.v(x))


class Padded(nn.Module):
    """torch's attention with a mask of keys."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x, hidden):
        x = self.embed(x)
        causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        padding = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]


def trained(model, x, hidden):
    prepared = tritonq.prepare_qat(model, example_inputs=(x, hidden)).train()
    for _ in range(3):
        prepared(x, hidden).square().mean().backward()
    return prepared.eval()


def inputs():
    torch.manual_seed(0)
    hidden = torch.zeros(2, TOKENS, dtype=torch.bool)
    hidden[:, 4:] = True
    return torch.randn(2, TOKENS, WIDTH), hidden


@pytest.mark.parametrize("form", [*FORMS, "padding"])
def test_hidden_tokens_tell_nothing_to_the_others(form):
    x, hidden = inputs()
    prepared = trained(Padded() if form == "padding" else Masked(form), x, hidden)
    other = x.clone()
    other[:, 4:] = -other[:, 4:]
    assert torch.equal(prepared(x, hidden)[:, :4], prepared(other, hidden)[:, :4])
    assert not torch.equal(prepared(x, hidden | True)[:, :4], prepared(x, hidden)[:, :4])
    assert torch.equal(tritonq.convert(prepared)(x, hidden), prepared(x, hidden))


@pytest.mark.parametrize("form", FORMS)
def test_scores_keep_their_resolution_under_a_mask(form):
    x, hidden = inputs()
    found = trained(Masked(form), x, hidden)(x, hidden)[0]
    assert len(found.unique(dim=0)) == TOKENS  # with one code for all scores each query would get the same


@pytest.mark.parametrize("form", ["-infinity", "with a learned bias"])
def test_masks_of_inputs_are_added_in_float_in_onnx_runtime_too(form, tmp_path):
    x, hidden = inputs()
    prepared = trained(Masked(form), x, hidden)
    tritonq.export_onnx(tritonq.convert(prepared), tmp_path / "model.onnx", (x, hidden))
    assert tritonq.verify(prepared, tmp_path / "model.onnx", [(x, hidden)]).agrees()


class Biased(nn.Module):
    """Scores with a bias that a layer makes: a sum of two quantized tensors."""

    def __init__(self):
        super().__init__()
        self.scores, self.bias = nn.Linear(WIDTH, TOKENS), nn.Linear(WIDTH, TOKENS)

    def forward(self, x):
        return (self.scores(x) + self.bias(x)).softmax(-1)


def test_a_bias_that_a_layer_makes_is_quantized():
    x = torch.randn(2, TOKENS, WIDTH)
    prepared = tritonq.prepare_qat(Biased(), example_inputs=x)
    assert [row.status for row in tritonq.summary(prepared).layers if row.kind == "add"] == ["quantized"]


def test_a_sum_of_a_product_and_a_mask_says_what_to_write_instead():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask):
            return torch.baddbmm(mask.expand(-1, TOKENS, -1), self.q(x), self.k(x).transpose(1, 2)).softmax(-1)

    x, hidden = inputs()
    with pytest.warns(UserWarning, match="its summand is a mask: write it as a matrix product and an addition"):
        tritonq.prepare_qat(Fused(), example_inputs=(x, hidden[:, None] * LOWEST))


class Refined(nn.Module):
    """An image and a correction that begins at 0."""

    def __init__(self):
        super().__init__()
        self.correction = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, x):
        return x + self.correction(x)


def test_an_image_beside_a_branch_of_zeros_is_no_mask():
    prepared = tritonq.prepare_qat(Refined(), example_inputs=torch.rand(2, 3, 8, 8) * 255)
    assert [row.status for row in tritonq.summary(prepared).layers if row.kind == "add"] == ["quantized"]
