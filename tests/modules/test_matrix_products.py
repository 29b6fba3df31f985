"""Matrix products of two activations, alone, as einsum and as attention: trained, converted, in ONNX Runtime."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from runtime_nodes import run_node
from tritonq.functional.integer_joins import integer_matmul
from tritonq.grid import Grid
from tritonq.nn import Einsum, MatMul, ScaledDotProductAttention
from tritonq.nn.einsum import Contraction
from tritonq.quantized_type import QuantizedType

UNSIGNED = QuantizedType(0, 255, symmetric=False)
HEADS, WIDTH, TOKENS = 2, 16, 9


def grid(scale, zero=0, qtype=UNSIGNED):
    return Grid(torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32), qtype)


def codes_of(y, output):
    return ((y / output.scale).round() + output.zero_point).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    "shapes", [((7, 64), (64, 5)), ((2, 3, 4, 300), (2, 3, 300, 5)), ((3, 6, 16), (16, 2))], ids=str
)
@pytest.mark.parametrize("zeros", [(0, 0, 0), (128, 128, 128), (3, 77, 17)])
def test_codes_as_onnx_runtime_multiplies_matrices(shapes, zeros):
    """Both sums in float32 and, over 300 products, in float64; powers of two make many ties."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for shape in shapes)
    for scales in ((2**-6, 2**-7, 2.0**-1), (2**-7, 2**-7, 3 * 2.0**-4), (0.0123, 0.0071, 0.37)):
        grids = [grid(scale, zero) for scale, zero in zip(scales, zeros, strict=True)]
        x, y = ((codes.float() - of.zero_point) * of.scale for codes, of in zip((a, b), grids, strict=False))
        ours = codes_of(integer_matmul(x, y, *grids), grids[2])
        found = run_node("QLinearMatMul", (a, b), [of.scale for of in grids], zeros)
        assert torch.equal(ours, found)
        sums = (a.double() - zeros[0]) @ (b.double() - zeros[1])
        exact = sums * (float(grids[0].scale) * float(grids[1].scale) / float(grids[2].scale)) + zeros[2]
        assert (ours - exact.clamp(0, 255)).abs().max() < 0.501


def test_a_product_too_long_for_int32_sums_is_refused():
    ones = torch.ones(1, 33_100)
    assert integer_matmul(ones[:, :33_000], ones[:, :33_000].T, grid(1.0), grid(1.0), grid(1000.0)).item() == 33_000
    with pytest.raises(ValueError, match="33100 elements"):
        integer_matmul(ones, ones.T, grid(1.0), grid(1.0), grid(1000.0))


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (16, torch.float64)])
def test_codes_that_tf32_does_not_hold_are_multiplied_in_float64(bits, dtype, monkeypatch):
    multiply, seen = torch.matmul, []
    monkeypatch.setattr(torch, "matmul", lambda a, b: seen.append(a.dtype) or multiply(a, b))
    wide = Grid(torch.tensor([1.0]), None, QuantizedType.of(bits))
    integer_matmul(torch.ones(1, 2), torch.ones(2, 1), wide, Grid(torch.tensor([1.0]), None, QuantizedType.of(2)), wide)
    assert seen == [dtype]


def test_sums_are_exact_where_a_symmetric_type_has_another_zero_point():
    """As one-sided ranges have it by the rule of torch's fused operator."""
    one = Grid(torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), QuantizedType(0, 255, True))
    wide = Grid(torch.tensor([1.0]), None, QuantizedType.of(32))
    a = torch.randint(128, 256, (16, 1001), generator=torch.Generator().manual_seed(0)).float()
    exact = a.double() @ a.double().T
    assert torch.equal(integer_matmul(a, a.T, one, one, wide), exact.float())


EQUATIONS = {
    "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "bqhd,bkhd->bhqk": ((2, 4, 3, 5), (2, 6, 3, 5)),
    "ij,jk": ((3, 4), (4, 2)),
    "bnd,md->nbm": ((2, 3, 4), (5, 4)),
    "i,j->ij": ((3,), (4,)),
    "...qd,...kd->...qk": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "...qd,...kd": ((2, 3, 4, 5), (3, 6, 5)),
    "b...d,bd...->b...": ((2, 3, 4, 5), (2, 5, 1, 4)),
    "...ij,jk->k...i": ((2, 3, 4, 5), (5, 6)),
    "...i,...j->ij": ((2, 3, 4), (2, 3, 5)),
    "bij,bjk": ((1, 3, 4), (2, 4, 5)),
    "ij,jk->ik": ((3, 1), (4, 5)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_is_one_product_of_batches_of_matrices(equation):
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in EQUATIONS[equation])
    torch.testing.assert_close(Einsum(equation)(a, b), torch.einsum(equation, a, b))


@pytest.mark.parametrize("equation", ["ij,kj,k->i", "ij->ji", "ij,kl->k", "ii,ij->ij", "ij,jk->il"])
def test_other_equations_are_refused(equation):
    with pytest.raises(ValueError, match=r"got|product of batches"):
        Contraction.of(equation)


def test_axes_that_an_ellipsis_alone_has_are_not_summed():
    with pytest.raises(ValueError, match="sums or repeats an index by itself"):
        Einsum("...i,...j->ij")(torch.randn(2, 3), torch.randn(4))
    with pytest.raises(ValueError, match="fewer than the indices"):
        Einsum("...ij,...jk")(torch.randn(2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="index 'j' has the sizes 3 and 4"):
        Einsum("ij,jk")(torch.randn(2, 3), torch.randn(4, 2))


SPELLINGS = {
    "ellipsis": lambda a, b: torch.einsum("...qd,...kd->...qk", a, b),
    "list": lambda a, b: torch.einsum("bqd,bkd->bqk", [a, b]),
    "indices": lambda a, b: torch.einsum(a, [..., 0, 1], b, [..., 2, 1], [..., 0, 2]),
    "indices of operands alone": lambda a, b: torch.einsum(a, [0, 1, 2], b, [0, 3, 2]),
    "baddbmm": lambda a, b: torch.baddbmm(a[:, :, :TOKENS], a, b.transpose(1, 2)),
    "addmm": lambda a, b: torch.addmm(a[0, :1, :TOKENS], a[0], b[0].T).expand(len(a), -1, -1),
}


class Spelled(nn.Module):
    def __init__(self, spelling, branches):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), nn.Linear(TOKENS, 3)
        self.spelling, self.branches = spelling, branches

    def forward(self, x):
        if self.branches and len(x) > 1000:  # no graph can stand for this forward: its calls are answered
            return x
        return self.head(SPELLINGS[self.spelling](self.a(x), self.b(x)))


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_is_quantized_trained_and_converted(spelling, branches, tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(2, TOKENS, 8), Spelled(spelling, branches)
    prepared = tritonq.prepare_qat(model, example_inputs=x, strict=True)
    for _ in range(3):
        prepared.train()(x).square().mean().backward()
    assert prepared.eval().a.weight.grad.any()
    products = [module for module in prepared.modules() if isinstance(module, MatMul)]
    assert products
    assert all(None not in product.input_quantizers for product in products)
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(x), prepared(x))
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", model)(x), converted(x))
    if branches:
        return  # the modules are the same
    tritonq.export_onnx(converted, tmp_path / "model.onnx", x, dynamic_batch=False)
    assert tritonq.verify(prepared, tmp_path / "model.onnx", [x]).agrees()
    found = optimised_kinds(tmp_path / "model.onnx")
    assert found["QLinearMatMul"] == len(products)
    assert not {"MatMul", "Add"} & set(found)


REFUSED = {
    "addbmm: it adds up a batch of products": lambda a, b: torch.addbmm(a[0] @ b[0].T, a, b.transpose(1, 2))[None],
    "baddbmm: it takes alpha=0.5": lambda a, b: torch.baddbmm(a @ b.mT, a, b.transpose(1, 2), alpha=0.5),
    "linalg_multi_dot: it multiplies in an order of its own": lambda a, b: torch.linalg.multi_dot([a[0], b[0].T])[None],
    "tensordot: write it as an einsum": lambda a, b: torch.tensordot(a, b[0], dims=([2], [1])),
    "inner: write it as a matrix product": lambda a, b: torch.inner(a, b[0]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_products_stay_in_float_and_are_told(reason, monkeypatch):
    monkeypatch.setitem(SPELLINGS, "refused", REFUSED[reason])
    with pytest.warns(UserWarning, match=reason):
        tritonq.prepare_qat(Spelled("refused", False), example_inputs=torch.randn(2, TOKENS, 8))


def test_a_sum_with_a_product_by_a_parameter_stays_in_float_and_is_told():
    class ByParameter(nn.Module):
        """GPT-2 writes its linear layers so."""

        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 4))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return torch.addmm(self.bias, self.layer(x), self.weight)

    with pytest.warns(UserWarning, match="addmm: its second matrix is a parameter"):
        tritonq.prepare_qat(nn.Sequential(ByParameter(), nn.Linear(4, 2)), example_inputs=torch.randn(2, 8))


MASK = torch.ones(5, 7, dtype=torch.bool).tril(1)
MASK[2] = False
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "added": {"attn_mask": torch.linspace(-2, 2, 35).view(5, 7)},
    "chosen": {"attn_mask": MASK},
    "chosen and causal": {"attn_mask": MASK.flip(1), "is_causal": True},
    "added, with a row of nothing": {"attn_mask": torch.zeros(5, 7).masked_fill(~MASK, float("-inf"))},
    "added to all rows and causal": {"attn_mask": torch.linspace(-2, 2, 7)[None], "is_causal": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_attention_computes_what_torch_does(option):
    q, k, v = (torch.randn(2, 3, *sizes, requires_grad=True) for sizes in ((5, 8), (7, 8), (7, 8)))
    found = ScaledDotProductAttention()(q, k, v, **OPTIONS[option])
    expected = F.scaled_dot_product_attention(q, k, v, **OPTIONS[option])
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected))
    torch.testing.assert_close(*gradients)


def test_attention_shares_heads_of_keys_as_torch_does():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(ScaledDotProductAttention()(q, k, v, enable_gqa=True), expected)


class Attention(nn.Module):
    """Self-attention in the spelling of timm, of einsum, of bmm or of torch's function; a graph can stand for it."""

    def __init__(self, spelling):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spelling, self.scale = spelling, (WIDTH // HEADS) ** -0.5

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling == "matmul":
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.spelling == "einsum":
            weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        elif self.spelling == "bmm":
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * self.scale).softmax(-1), v).unflatten(0, (b, HEADS))
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, -1))


class BranchingAttention(Attention):
    """No graph can stand for this forward: its calls are answered."""

    def forward(self, x):
        return x if x.shape[1] > 1000 else super().forward(x)


def trained(x, *attention):
    model = nn.Sequential(nn.Linear(8, WIDTH), *attention, nn.Linear(WIDTH, 4))
    prepared = tritonq.prepare_qat(model, example_inputs=x).train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    return model, prepared.eval()


def test_attention_in_any_spelling_runs_in_integers_converted_from_files_and_in_onnx_runtime(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, TOKENS, 8)
    answered = [BranchingAttention("einsum"), BranchingAttention("bmm"), BranchingAttention("sdpa")]
    model, prepared = trained(x, Attention("matmul"), Attention("sdpa"), *answered)
    products = [module for module in prepared.modules() if isinstance(module, MatMul)]
    assert len(products) == 10
    assert all(None not in product.input_quantizers for product in products)
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(x), prepared(x))
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", model)(x), converted(x))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", x)
    found = optimised_kinds(tmp_path / "model.onnx")
    assert found["QLinearMatMul"] == 10
    assert found["QGemm"] == 12
    assert not {"MatMul", "Gemm", "Einsum", "MatMulIntegerToFloat"} & set(found)
    compared = tritonq.verify(converted, tmp_path / "model.onnx", [x])
    islands = {layer.name: layer.island for layer in compared.layers if layer.island}
    assert set(islands.values()) <= {("Softmax",), ("LayerNormalization",)}
    assert all(layer.largest <= bool(layer.island) for layer in compared.layers)


def test_codes_of_the_products_are_those_of_integer_arithmetic():
    """Scores and sums of weighted values from the quantizers' own codes, in int64."""
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, 8)
    _, prepared = trained(x, Attention("matmul"))
    for product in (module for module in prepared.modules() if isinstance(module, MatMul)):
        seen = {}
        product.register_forward_hook(lambda module, args, y, seen=seen: seen.update(args=args, y=y))
        prepared(x)
        a, b = product.input_quantizers
        codes = [((v / of.scale).round()).long() for v, of in zip(seen["args"], (a, b), strict=True)]
        sums = codes[0] @ codes[1]
        output = product.activation_post_process
        steps = (sums.float() * (a.scale * b.scale / output.scale)).round() + output.zero_point
        assert torch.equal(steps.clamp(0, 255), (seen["y"] / output.scale).round() + output.zero_point)


class Queries(nn.Module):
    """Learned queries attend to a sequence."""

    def __init__(self):
        super().__init__()
        self.queries, self.key = nn.Parameter(torch.randn(3, WIDTH)), nn.Linear(8, WIDTH)

    def forward(self, x):
        return (self.queries @ self.key(x).transpose(1, 2)).softmax(-1)


def test_an_operand_that_is_a_parameter_is_rounded_where_it_is_read():
    x = torch.randn(2, TOKENS, 8)
    prepared = tritonq.prepare_qat(nn.Sequential(Queries(), nn.Linear(TOKENS, 2)), example_inputs=x).train()
    (product,) = [module for module in prepared.modules() if isinstance(module, MatMul)]
    assert None not in product.input_quantizers
    prepared(x).sum().backward()
    assert prepared[0].queries.grad is not None
    prepared.eval()
    assert torch.equal(tritonq.convert(prepared)(x), prepared(x))


def test_a_product_without_a_quantized_neighbour_stays_in_float():
    class Gram(nn.Module):
        def forward(self, x):
            return x @ x.transpose(-2, -1)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gram = nn.Linear(8, 8), Gram()

        def forward(self, x, y):
            return self.layer(x), self.gram(y)

    inputs = (torch.randn(2, 8), torch.randn(2, 3, 8))
    with pytest.warns(UserWarning, match="matmul: nothing that it reads"):
        prepared = tritonq.prepare_qat(Both(), example_inputs=inputs)
    assert not any(isinstance(module, MatMul) for module in prepared.modules())
