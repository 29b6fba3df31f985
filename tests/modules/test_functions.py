"""Functions of one tensor: one table of codes in eval mode, converted models, ONNX files and programs."""

import copy
import math
import warnings

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from prepared_nets import quantizers
from saved_bytes import saved_bytes
from tolerances import SUMS, assert_close
from tritonq.deploy import onnx_functions
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.functions import FUNCTION_MODULES, FunctionLayer, PReLU, function_of
from tritonq.reference.functions import DEFINITIONS, Function

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
QCONFIG = tritonq.get_qconfig("onnxruntime")
ARGUMENTS = {"leaky_relu": (0.1,), "elu": (1.0,), "softplus": (1.0, 20.0), "clip": (-1.3, 2.1)}
ARGUMENTS |= {"plus": (0.3,), "times": (-0.7,), "over": (3.0,), "from": (1.1,), "ratio": (0.1,)}
FUNCTIONS = [Function(name, ARGUMENTS.get(name, ())) for name in DEFINITIONS]
FUNCTIONS.append(Function("plus > clip > over", (3.0, 0.0, 6.0, 6.0)))
MODULES = [*(kind() for kind in FUNCTION_MODULES), nn.GELU("tanh"), nn.PReLU(8), nn.PReLU()]


class Shifted(nn.Module):
    def forward(self, x):
        return x + 3


def changed_in_place(x):
    x *= 2
    x += 1
    return x


ARITHMETIC = {
    "x * 2": (lambda x: x * 2, "times"),
    "0.3 * x": (lambda x: 0.3 * x, "times"),
    "torch.mul": (lambda x: torch.mul(2, x), "times"),
    "x.mul_": (lambda x: x.mul_(2), "times"),
    "-x": (lambda x: -x, "times"),
    "x - 1": (lambda x: x - 1, "plus"),
    "alpha": (lambda x: torch.sub(x, 1, alpha=2), "plus"),
    "1 - x": (lambda x: 1 - x, "from"),
    "x / 3": (lambda x: x / 3, "over"),
    "0.1 / x": (lambda x: 0.1 / (x.abs() + 1), "abs > plus > ratio"),
    "x.square": (lambda x: x.square(), "square"),
    "x ** 2": (lambda x: x**2, "square"),
    "x *= 2": (changed_in_place, "times > plus"),
    "Hardsigmoid": (lambda x: F.relu6(x + 3) / 6, "plus > clip > over"),
    "sigmoid": (lambda x: 2 * x.sigmoid() - 1, "sigmoid > times > plus"),
    "module": (nn.Sequential(Shifted(), nn.SiLU()), "plus > silu"),
    "ReLU": (nn.Sequential(nn.AvgPool2d(1), Shifted(), nn.ReLU()), "plus > clip"),
}
CALLS = {
    "F.silu": F.silu,
    "torch.sigmoid": torch.sigmoid,
    "method": lambda x: x.sigmoid(),
    "F.hardswish": F.hardswish,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "keyword": lambda x: F.gelu(x, approximate="tanh"),
    "in place": lambda x: F.silu(x, inplace=True),
}


class AllFunctions(nn.Module):
    """One input on a grid, and every function of it, each with a grid of its own."""

    def __init__(self, qconfig):
        super().__init__()
        self.input = qconfig.activation()
        made = [FunctionLayer(function, qconfig=qconfig) for function in FUNCTIONS]
        self.layers = nn.ModuleList([*made, PReLU(qconfig=qconfig)])
        self.conv = tritonq.nn.Conv2d(1, 1, 1, qconfig=qconfig)  # what convert needs
        for layer in self.layers:
            layer.set_quantizers(self.input)

    def forward(self, x):
        x = self.input(x)
        return (self.conv(x), *(layer(x) for layer in self.layers))


def every_code(quantizer):
    """Return a batch of one image that holds the value of each of the 256 codes."""
    codes = torch.arange(256.0) + quantizer.qtype.quant_min - quantizer.zero_point
    return (codes * quantizer.scale).view(1, 1, 16, 16)


@pytest.fixture(scope="module", params=["onnxruntime", "megengine_ema"])
def all_functions(request, tmp_path_factory):
    """A model whose scales are powers of two, so that results lie on ties, and its file."""
    model = AllFunctions(tritonq.get_qconfig(request.param)).train()
    model(torch.linspace(-6, 6, 256).view(1, 1, 16, 16))
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase) and module.qtype.axis is None:
            module.scale.copy_(2.0 ** torch.ceil(torch.log2(module.scale)))
    model.eval()
    path = tmp_path_factory.mktemp("functions") / "m.onnx"
    x = every_code(model.input)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ONNX Runtime convolves in integers")
        tritonq.export_onnx(model, path, x, dynamic_batch=False)
    return model, path, x


def test_every_form_gives_the_same_codes(all_functions):
    model, path, x = all_functions
    converted = tritonq.convert(model)
    forms = {
        "converted": converted,
        "ONNX": path,
        "program": tritonq.export_program(converted, None, x, dynamic_batch=False),
    }
    for name, form in forms.items():
        report = tritonq.verify(model, form, x)
        assert len(report.layers) == 2 + len(model.layers)
        assert report.agrees(), f"{name}: {report}"


def test_codes_are_those_of_the_float32_formula(all_functions):
    model, _, x = all_functions
    for layer in model.layers[:-1]:
        quantizer = layer.activation_post_process
        steps = layer.function.deployed(x) / quantizer.scale
        rounded = (
            steps.round() if quantizer.qtype.rounding == "half_even" else (steps.abs() + 0.5).floor() * steps.sign()
        )
        codes = (rounded + quantizer.zero_point).clamp(quantizer.quant_min, quantizer.quant_max)
        assert torch.equal(layer(x), (codes - quantizer.zero_point) * quantizer.scale), layer
        wide = x.expand(3, 5, -1, -1).contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer(wide), layer(x).expand(3, 5, -1, -1))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_float32_formulas_are_torchs_but_for_rounding(function):
    x = torch.linspace(-8, 8, 1001)
    assert_close(function.deployed(x), function(x), SUMS, size=0.1)


def test_nan_stays_nan(all_functions):
    model, _, _ = all_functions
    assert model.layers[0](torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.bn, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.second(self.act(self.bn(self.first(x))))


def net(act):
    torch.manual_seed(0)
    if isinstance(act, nn.Module):
        return Net(act)

    class Written(Net):
        def forward(self, x):
            return self.second(act(self.bn(self.first(x))))

    return Written(None)


def prepared(model, preset="onnxruntime"):
    return tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig(preset), example_inputs=X)


@pytest.mark.parametrize("act", [*MODULES, *CALLS.values()], ids=[*(repr(module) for module in MODULES), *CALLS])
def test_preparation_finds_it(act, tmp_path):
    model = prepared(net(act)).train()
    (layer,) = (module for module in model.modules() if isinstance(module, (FunctionLayer, PReLU)))
    assert layer.input_quantizer is model.first.activation_post_process
    if isinstance(act, nn.Module) and not isinstance(act, nn.PReLU):
        assert layer.function == function_of(act)
    model(X).sum().backward()
    assert model.first.weight.grad.isfinite().all()
    model.eval()
    converted = tritonq.convert(model)
    tritonq.save_converted(converted, tmp_path / "m.pt")
    loaded = tritonq.load_converted(tmp_path / "m.pt", net(copy.deepcopy(act)))
    for form in (converted, loaded):
        for x in (X, X.to(memory_format=torch.channels_last)):
            assert tritonq.verify(model, form, x).agrees()


@pytest.mark.parametrize(("act", "name"), ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_with_numbers_is_one_function(act, name, tmp_path):
    model = prepared(net(act)).train()
    assert [row.name for row in tritonq.summary(model).layers if row.status == "float"] == []
    (layer,) = (module for module in model.modules() if isinstance(module, FunctionLayer))
    assert layer.function.name == name
    plain = net(act).train()
    tritonq.prepare.disable_fake_quant(model)
    tritonq.prepare.disable_observer(model)
    assert_close(model(X), plain(X), SUMS, size=10)
    tritonq.prepare.enable_fake_quant(model)
    tritonq.prepare.enable_observer(model)
    model(X).sum().backward()
    assert model.first.weight.grad.isfinite().all()
    model.eval()
    converted, path = tritonq.convert(model), tmp_path / "m.onnx"
    tritonq.save_converted(converted, tmp_path / "m.pt")
    tritonq.export_onnx(converted, path, X)
    forms = {
        "converted": converted,
        "loaded": tritonq.load_converted(tmp_path / "m.pt", net(copy.deepcopy(act))),
        "ONNX": path,
        "program": tritonq.export_program(converted, None, X),
    }
    for kind, form in forms.items():
        assert tritonq.verify(model, form, X).total.differing == 0, kind


class Branching(Net):
    """A forward that keeps its branches, and a number that may change."""

    factor = 2.0

    def forward(self, x):
        y = self.bn(self.first(x))
        if x.shape[1] > 3:
            y = y.flip(1)
        return self.second(F.silu(y * self.factor) + 1)


def test_a_number_that_changes_is_told():
    torch.manual_seed(0)
    model = prepared(Branching(None)).train()
    assert sorted(m.function.name for m in model.modules() if isinstance(m, FunctionLayer)) == ["silu > plus", "times"]
    model(X)
    converted = tritonq.convert(model.eval())
    assert tritonq.verify(model, converted, X).total.differing == 0
    model.factor = 3.0
    returned = []
    model.first.register_forward_hook(lambda module, given, y: returned.append(y))
    model.add.register_forward_pre_hook(lambda module, given: returned.append(given[0]))
    with pytest.warns(UserWarning, match="other arguments"):
        model(X)
    assert torch.equal(returned[1], model.mul_fake_quant(3 * returned[0]))  # and rounded all the same


@pytest.mark.filterwarnings("ignore:no training step reached")
def test_a_file_does_not_fit_another_function(tmp_path):
    converted = tritonq.convert(prepared(net(nn.SiLU())).eval(), allow_unquantized=True)
    tritonq.save_converted(converted, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="'act' differs: SiLU in the file, Mish in the model"):
        tritonq.load_converted(tmp_path / "m.pt", net(nn.Mish()))


def test_tensorrt_rounds_after_the_function_alone():
    first, second = "first.input_fake_quant", "second.activation_post_process"
    assert list(quantizers(prepared(net(nn.SiLU()), "tensorrt"))) == [first, "act.activation_post_process", second]
    assert list(quantizers(prepared(net(F.silu), "tensorrt"))) == [first, second, "silu_fake_quant"]
    assert "first.activation_post_process" in quantizers(prepared(net(nn.SiLU())))


def test_onnx_runtime_sums_a_layer_without_rounding_in_integers(tmp_path):
    for preset, islands in (("tensorrt", {("Sigmoid",)}), ("onnxruntime", set())):
        model = prepared(net(nn.SiLU()), preset).train()
        model(X)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tritonq.export_onnx(model.eval(), tmp_path / "m.onnx", X, target="onnxruntime")
        told = [str(warning.message) for warning in caught if "run in float" in str(warning.message)]
        assert not told
        result = tritonq.verify(model, tmp_path / "m.onnx", X)
        assert result.agrees()
        assert {layer.island for layer in result.layers if layer.island} == islands


def test_a_function_between_a_layer_and_a_mean_is_rounded():
    class Pooled(Net):
        def forward(self, x):
            return self.second(F.hardswish(self.first(x)).mean((2, 3), keepdim=True).expand(-1, -1, 3, 3))

    model = prepared(Pooled(None))
    assert model.mean.input_quantizer is model.hardswish_fake_quant


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_training_saves_no_more_than_float_training(preset):
    def model():
        convs = [nn.Conv2d(n_in, 8, 3, bias=False) for n_in in (3, 8)]
        return nn.Sequential(convs[0], nn.BatchNorm2d(8), nn.SiLU(), convs[1], nn.BatchNorm2d(8), nn.Flatten())

    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quantized, twin = prepared(model(), preset).train(), model().train()
    quantized(x)
    assert saved_bytes(quantized, x) <= saved_bytes(twin, x)


def test_gradients_are_those_of_function_and_quantizer():
    layer = FunctionLayer(Function("silu"), qconfig=QCONFIG).train()
    twin = copy.deepcopy(layer.activation_post_process)
    # Switch the observer on and off, and rounding too: the range is narrower than the last batch.
    for step, x in enumerate((X, 3 * X, X)):
        if step == 1:
            layer.apply(tritonq.disable_observer)
            twin.disable_observer()
        if step == 2:
            layer.apply(tritonq.disable_fake_quant)
            twin.disable_fake_quant()
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, expected = layer(a), twin(F.silu(b))
        y.backward(X)
        expected.backward(X)
        assert torch.equal(y, expected)
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(layer.activation_post_process.scale, twin.scale)


def test_compiled_models_give_the_same_codes():
    model = prepared(net(F.hardswish)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X).sum().backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))


def test_a_code_that_the_engine_rounds_otherwise_is_read_from_a_table(tmp_path, monkeypatch):
    model = prepared(net(nn.Tanh())).train()
    model(X)
    model.eval()
    tritonq.export_onnx(model, tmp_path / "m.onnx", X)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "Tanh" in kinds
    assert "Gather" not in kinds
    run = onnx_functions.run_function
    monkeypatch.setattr(onnx_functions, "run_function", lambda *arguments: run(*arguments) ^ 1)
    tritonq.export_onnx(model, tmp_path / "m.onnx", X)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "Tanh" not in kinds
    assert "Gather" in kinds
    assert tritonq.verify(model, tmp_path / "m.onnx", X).agrees()


def test_a_compiled_prelu_rounds_ties_as_eager_mode_does():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.PReLU(1, 0.25), nn.Conv2d(1, 1, 1))
    net[0].weight.data.fill_(1)
    x = torch.linspace(-6, 6, 999).view(1, 1, 1, -1)
    model = tritonq.prepare_qat(net, example_inputs=x)
    model.train()(x)
    for layer, scale in ((model[0], 0.03), (model[1], 0.015)):
        layer.activation_post_process.scale.fill_(scale)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
