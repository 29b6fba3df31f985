"""Sums, products, differences, concatenations and gates: one arithmetic in eval mode, deployed and in ONNX Runtime."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from runtime_nodes import run_node
from tolerances import SUMS, assert_close
from tritonq.functional.integer_joins import integer_add, integer_concatenation, integer_multiply, integer_subtract
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType

UNSIGNED = QuantizedType(0, 255, symmetric=False)
# Zero points of two operands and the result.
ZEROS = [(0, 0, 0), (128, 128, 128), (3, 77, 17), (128, 128, 0)]


def grids(scales, zeros):
    return [
        Grid(torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32), UNSIGNED)
        for scale, zero in zip(scales, zeros, strict=True)
    ]


def values(codes, grid):
    return (codes.float() - grid.zero_point) * grid.scale


def codes_of(y, grid):
    return ((y / grid.scale).round() + grid.zero_point).clamp(0, 255).to(torch.uint8)


def some_scales(kind):
    """Scales of two operands and the result: random ones, and by turns such as make many ties."""
    generator = torch.Generator().manual_seed(1)
    for trial in range(20):
        a, b = (torch.rand(2, generator=generator) * 0.04 + 0.01).tolist()
        factor = 1 + trial % 3
        if kind == "mul":
            yield [2**-5, 2**-7, 2**-7 * factor] if trial % 2 else [a, b, a * b * 100.5]
        else:
            yield [a, b, a * factor if trial % 2 else 1.1 * (a + b)]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize(
    ("kind", "join", "node", "sign"),
    [
        ("add", integer_add, "QLinearAdd", 1),
        ("sub", integer_subtract, "QLinearAdd", -1),
        ("mul", integer_multiply, "QLinearMul", 1),
    ],
)
def test_every_pair_of_codes_as_onnx_runtime_joins_them(kind, join, node, sign, zeros):
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    codes = [column.contiguous() for column in pairs.unbind(1)]
    for scales in some_scales(kind):
        a, b, output = grids(scales, zeros)
        x, y = values(codes[0], a), values(codes[1], b)
        ours = codes_of(join(x, y, a, b, output), output)
        assert torch.equal(ours, run_node(node, codes, [a.scale, sign * b.scale, output.scale], zeros)), scales
        exact = getattr(torch, kind)(x, y) / output.scale + output.zero_point
        assert (ours - exact.clamp(0, 255)).abs().max() < 0.501


@pytest.mark.parametrize(
    "shapes", [((256, 1), (1, 256)), ((1, 256), (256, 1)), ((256, 1, 1), (1, 256, 1)), ((256,), (1, 256, 256))], ids=str
)
def test_broadcast_sums_as_onnx_runtime_adds_them(shapes):
    """The one that is broadcast counts as the second: so the file has it, in either layout."""
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for shape in shapes]
    for given in some_scales("add"):
        (a, b, output), zeros = grids(given, ZEROS[2]), ZEROS[2]
        ours = codes_of(integer_add(values(codes[0], a), values(codes[1], b), a, b, output), output)
        both = codes, [a.scale, b.scale, output.scale], zeros
        if shapes[0] == (256,):
            both = tuple([item[1], item[0], *item[2:]] for item in both)
        assert torch.equal(ours, run_node("QLinearAdd", *both)), given


def test_every_code_as_onnx_runtime_concatenates_it():
    codes = [torch.arange(256).to(torch.uint8)] * 2
    for trial, scales in enumerate(some_scales("cat")):
        zeros = ZEROS[trial % 4]
        scales[2] = scales[trial % 2] * (1 + trial % 5) / 2
        a, b, output = grids(scales, zeros)
        ours = codes_of(integer_concatenation((values(codes[0], a), values(codes[1], b)), 0, output), output)
        assert torch.equal(ours, run_node("QLinearConcat", codes, [a.scale, b.scale, output.scale], zeros)), trial


def gate(x):
    return torch.sigmoid(x.mean((2, 3), keepdim=True))


# What stands between two convolutions of 8 channels and the next, its channels, and the integer node that it becomes.
JOINS = {
    "product": (lambda a, b: a * b, 8, "QLinearMul"),
    "product and ReLU": (lambda a, b: F.relu(torch.multiply(a, b)), 8, "QLinearMul"),
    "squeeze and excite": (lambda a, b: a * gate(b), 8, "QLinearMul"),
    "gate in place": (lambda a, b: gate(b).expand_as(a).clone().mul_(a), 8, "QLinearMul"),
    "attention gate": (lambda a, b: torch.sigmoid(b[:, :1]) * a, 8, "QLinearMul"),
    "difference": (lambda a, b: a - b, 8, "QLinearAdd"),
    "difference and ReLU": (lambda a, b: F.relu(F.relu(a).sub(F.relu(b))), 8, "QLinearAdd"),
    "broadcast sum": (lambda a, b: b.mean((2, 3), keepdim=True) + a, 8, "QLinearAdd"),
    "both broadcast": (lambda a, b: a.mean(3, keepdim=True) + b.mean(2, keepdim=True), 8, "QLinearAdd"),
    "broadcast difference": (lambda a, b: b.mean((2, 3), keepdim=True) - F.relu(a), 8, "QLinearAdd"),
    "concatenation": (lambda a, b: torch.concat((F.relu(a), b), dim=1), 16, "QLinearConcat"),
}


class Net(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.join, channels, _ = JOINS[join]
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        return self.head(self.join(self.a(x), self.b(x)))


def trained(net, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(32, 3, 10, 10)
    qat = tritonq.prepare_qat(net(), example_inputs=x[:2], strict=True).train()
    qat(x).square().mean().backward()
    return qat.eval(), x


@pytest.mark.parametrize("join", JOINS)
def test_every_form_gives_the_same_codes(join, tmp_path):
    qat, x = trained(lambda: Net(join))
    int8 = tritonq.convert(qat)
    tritonq.save_converted(int8, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Net(join))
    tritonq.export_onnx(int8, tmp_path / "model.onnx", x[:2])
    forms = [int8, loaded, tmp_path / "model.onnx"]
    if join in ("product", "broadcast difference", "concatenation"):
        forms.append(tritonq.export_program(int8, None, x[:2]))
    for form in forms:
        assert tritonq.verify(qat, form, x).total.differing == 0
    kinds = optimised_kinds(tmp_path / "model.onnx")
    assert (kinds[JOINS[join][2]], kinds["QLinearConv"]) == (1, 3)


def test_an_argument_without_an_integer_form_is_told():
    class Scaled(Net):
        def forward(self, x):
            return self.head(torch.add(self.a(x), self.b(x), alpha=2))

    with pytest.warns(UserWarning, match="add: it takes alpha=2"):
        tritonq.prepare_qat(Scaled("product"), example_inputs=torch.randn(2, 3, 8, 8))


def test_constants_and_numbers_join_nothing():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.table = nn.Parameter(torch.randn(1, 8, 20, 20))

        def forward(self, x):
            x = self.a(x)
            table = self.table[..., : x.shape[2], : x.shape[3]].flip(1)
            return self.b(2 * (x * table) + 1 - torch.zeros(8, 1, 1))

    qat = tritonq.prepare_qat(Positions(), example_inputs=torch.randn(2, 3, 8, 8))
    assert not any(isinstance(module, tritonq.nn.Joint) for module in qat.modules())


@pytest.mark.parametrize("kind", ["sub", "mul"])
def test_gradients_are_those_of_the_parts(kind):
    torch.manual_seed(0)
    make = {"sub": tritonq.nn.Sub, "mul": tritonq.nn.Mul}[kind]
    for shapes in ([(2, 3, 4, 5), (2, 3, 4, 5)], [(2, 3, 1, 1), (2, 3, 4, 5)]):
        join = make(2.0, qconfig=tritonq.get_qconfig("tensorrt"))
        quantizer = tritonq.get_qconfig("tensorrt").activation()
        a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
        dy = torch.randn(2, 3, 4, 5)
        expected = quantizer(F.hardtanh(a - b if kind == "sub" else a * b, 0, 2))
        found = join(a, b)
        assert torch.equal(found, expected)
        wanted = torch.autograd.grad(expected, (a, b), dy)
        for mine, other in zip(torch.autograd.grad(found, (a, b), dy), wanted, strict=True):
            assert_close(mine, other, SUMS, size=0.1)


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
def test_a_number_does_not_change_the_dtype(kind):
    """As in torch: a tensor without axes, such as a learned factor, leaves a bfloat16 tensor in its dtype."""
    join = {"add": tritonq.nn.Add, "sub": tritonq.nn.Sub, "mul": tritonq.nn.Mul}[kind](qconfig=tritonq.get_qconfig())
    x, y = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(2, 3)
    for a, b in ((x, torch.tensor(2.0)), (torch.tensor(2.0), x), (y, torch.tensor(2.0).double()), (x, y)):
        factors = [factor.requires_grad_() for factor in (a.clone(), b.clone())]
        found = join(*factors)
        assert found.dtype == torch.result_type(a, b)
        found.sum().backward()
        assert [factor.grad.dtype for factor in factors] == [a.dtype, b.dtype]


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Minimum", "Cat"])
@pytest.mark.parametrize("mode", ["training", "eval", "compiled"])
@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_operands_of_two_dtypes_give_the_wider_one(kind, mode, dtypes):
    qconfig = tritonq.get_qconfig("tensorrt")
    join, quantizer = getattr(tritonq.nn, kind)(qconfig=qconfig), tritonq.FakeQuantize(dtype="qint8_narrow")
    a, b = (torch.rand(4, 4).to(getattr(torch, dtype)) for dtype in dtypes)
    quantizer(a.float())
    call = join if kind != "Cat" else lambda a, b: join([a, b])
    if kind != "Cat":
        join.set_producers(quantizer, quantizer)
    call(a, b)
    join.train(mode == "training")
    quantizer.eval()
    torch.compiler.reset()
    run = torch.compile(call, backend="eager") if mode == "compiled" else call
    assert run(quantizer(a), quantizer(b)).dtype == torch.float32


def test_a_product_keeps_codes_and_bits():
    """Float saves 8 bytes per element: both factors."""
    qat, x = trained(lambda: Net("product"))
    qat.train()
    first, second = (layer(x) for layer in (qat.a, qat.b))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qat.mul(first, second)
    assert sum(t.untyped_storage().nbytes() for t in saved) < 2.2 * first.numel()


@pytest.mark.parametrize("join", ["squeeze and excite", "difference", "concatenation"])
def test_compiled_models_give_the_same_codes(join):
    qat, x = trained(lambda: Net(join))
    compiled = torch.compile(qat, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), qat(x))
    qat.train()
    assert torch.equal(torch.compile(qat, backend="aot_eager", fullgraph=True)(x), qat(x))
