"""Models that others wrapped before or after preparation: torch.compile, accelerate's autocast."""

import copy
import threading
import types
import warnings

import pytest
import torch
from torch import fx, nn

import tritonq
from prepared_nets import X, conv
from tritonq import nn as qnn


def model():
    return nn.Sequential(conv(), nn.ReLU(), nn.Sequential(conv(), nn.ReLU()))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore:no training step reached")
def test_compiled_models_and_parts_are_prepared_as_what_is_inside(inplace):
    plain = model().train()
    whole = torch.compile(plain, backend="eager")
    prepared = tritonq.prepare_qat(whole, inplace=inplace, example_inputs=X)
    assert (prepared is plain) == inplace
    assert isinstance(prepared[0], qnn.ConvReLU2d)
    parts = model().train()
    parts[2] = torch.compile(parts[2], backend="eager")
    prepared = tritonq.prepare_qat(parts, inplace=inplace, example_inputs=X)
    assert isinstance(prepared[2][0], qnn.ConvReLU2d)
    assert isinstance(parts[2], nn.Sequential) == inplace
    again = torch.compile(prepared, backend="eager")
    again(X).sum().backward()
    assert tritonq.verify(again, tritonq.convert(again.eval()), X).agrees()


def test_export_names_autocast_around_a_forward(tmp_path):
    prepared = tritonq.prepare_qat(model().train(), example_inputs=X)
    prepared.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(prepared.forward.__func__), prepared)
    prepared(X).float().sum().backward()
    with pytest.raises(ValueError, match="forward of 'Sequential' is wrapped in autocast"):
        tritonq.export_onnx(tritonq.convert(prepared.eval()), tmp_path / "model.onnx", X)


def test_only_the_wrapper_of_torch_compile_counts_as_one():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod, self.head = conv(), conv()

        def forward(self, x):
            return self.head(self._orig_mod(x))

    prepared = tritonq.prepare_qat(Holder(), example_inputs=X)
    assert isinstance(prepared, Holder)
    assert isinstance(prepared._orig_mod, qnn.Conv2d)
    compiled = model()
    compiled.compile(backend="eager")
    assert tritonq.prepare_qat(compiled, example_inputs=X)._compiled_call_impl is None


class Gate(nn.Module):
    """Reads a tensor twice, with weights of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.sigmoid(self.norm(self.conv(x))) * x


class Scripted(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.stem, self.gate, self.head = conv(), gate, conv()

    def forward(self, x):
        return self.head(torch.relu(self.gate(x=self.stem(x))))


@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_scripted_parts_run_in_float_and_are_told(compiler, tmp_path):
    gate = Gate()
    example = torch.randn(X.shape[0], 4, *X.shape[2:])
    gate = torch.jit.script(gate) if compiler == "script" else torch.jit.trace(gate.eval(), example)
    float_model = Scripted(gate).train()
    hooks = len(torch.nn.modules.module._global_forward_hooks_with_kwargs)
    with pytest.warns(UserWarning, match=r"layers and joins of Scripted in float: gate: torch\.jit made it"):
        prepared = tritonq.prepare_qat(float_model, example_inputs=X)
    assert len(torch.nn.modules.module._global_forward_hooks_with_kwargs) == hooks
    assert prepared.gate.training
    rows = {row.name: row.status for row in tritonq.summary(prepared).layers}
    assert list(rows)[:2] == ["stem", "gate"]
    assert rows["stem"] == rows["head"] == "quantized"
    assert rows["gate"] == "float"
    assert not any(name.startswith("gate.") for name in rows)
    prepared(X).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    converted = tritonq.convert(prepared.eval())
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Scripted(gate))
    assert torch.equal(converted(X), prepared(X))
    assert torch.equal(loaded(X), prepared(X))


class LowRank(nn.Module):
    """A frozen layer with an adapter, as peft's LoRA layers are."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling, self.active = {"default": 2.0}, ["default"]

    def forward(self, x):
        result = self.base_layer(x)
        for name in self.active:
            down = self.lora_A[name](self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype)))
            result = result + self.lora_B[name](down) * self.scaling[name]
        return result


@pytest.mark.parametrize(("rank", "frozen"), [(2, True), (8, True), (2, False)])
def test_adapters_of_low_rank_stay_in_float_beside_a_frozen_layer(rank, frozen):
    float_model = nn.Sequential(LowRank(nn.Linear(8, 8), rank), nn.ReLU(), nn.Linear(8, 4))
    if not frozen:
        float_model.requires_grad_(True)
    x = torch.randn(4, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepared = tritonq.prepare_qat(float_model, example_inputs=x)
    rows = {row.name: row for row in tritonq.summary(prepared).layers}
    is_adapter = rank < 8 and frozen
    assert {rows[f"0.lora_{part}.default"].status for part in "AB"} == {"float" if is_adapter else "quantized"}
    assert rows["0.base_layer"].status == rows["0.add"].status == "quantized"
    assert is_adapter == any("adapter of low rank beside 0.base_layer" in str(warning.message) for warning in told)
    prepared(x).sum().backward()
    assert tritonq.verify(prepared.eval(), tritonq.convert(prepared), x).agrees()


def test_adapters_of_layers_with_one_input_are_told_beside_their_own_layer():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v, self.out = LowRank(nn.Linear(8, 8), 2), LowRank(nn.Linear(8, 8), 2), nn.Linear(8, 4)

        def forward(self, x):
            return self.out(torch.relu(self.q(x)) * self.v(x))

    prepared = tritonq.prepare_qat(Gate(), example_inputs=torch.randn(4, 8), warn=False)
    reasons = {row.name: row.reason for row in tritonq.summary(prepared).in_float}
    assert reasons == {
        f"{layer}.lora_{part}.default": f"it belongs to an adapter of low rank beside {layer}.base_layer, "
        "which is frozen"
        for layer in "qv"
        for part in "AB"
    }


class Remembers(nn.Module):
    def __init__(self, unlucky=None):
        super().__init__()
        self.first, self.second = conv(), conv()
        self.seen, self.by_name, self.last, self.unlucky = [], {}, None, unlucky

    def forward(self, x):
        self.last = self.first(x)
        self.seen.append(self.last)
        self.by_name["first"] = [self.last]
        return self.second(self.last)


def test_models_that_hold_activations_can_be_prepared_and_converted():
    float_model = Remembers()
    float_model(X)
    prepared = tritonq.prepare_qat(float_model, example_inputs=X)
    prepared(X).sum().backward()
    assert tritonq.verify(prepared.eval(), tritonq.convert(prepared), X).agrees()
    with pytest.raises(ValueError, match=r"copied \(attribute 'unlucky' of the model, a lock\).*inplace=True"):
        tritonq.prepare_qat(Remembers(threading.Lock()), example_inputs=X)


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act, self.last = conv(), conv(), nn.ReLU(), nn.Bilinear(4, 4, 2)

    def forward(self, x):
        x = self.first(x)
        return x + self.act(self.second(x))


class TwoGraphs(fx.GraphModule):
    """As torchvision's ``create_feature_extractor`` makes them: ``train()`` puts one of two graphs in place."""

    def __init__(self, root, train_graph, eval_graph):
        super().__init__(root, train_graph)
        self.train_graph, self.eval_graph = train_graph, eval_graph

    def train(self, mode=True):
        if mode != self.training:
            self.graph = self.train_graph if mode else self.eval_graph
        return super().train(mode)

    def _deepcopy_init(self):
        def made_anew(module, root, graph):
            module.__init__(root, root.train_graph, root.eval_graph)

        return made_anew


def test_feature_extractors_with_a_graph_for_each_mode_keep_their_quantizers():
    root = Shortcut()
    graphs = fx.Tracer().trace(root), fx.Tracer().trace(root)
    made = TwoGraphs(root, *graphs)
    prepared = tritonq.prepare_qat(made, example_inputs=X)
    for mode in (True, False, True, False):
        prepared.train(mode)
        assert "self.add" in prepared.code
        assert torch.equal(copy.deepcopy(prepared).train(mode)(X), prepared(X))
    assert torch.equal(tritonq.convert(prepared)(X), prepared(X))
    (node,) = (node for node in made.train_graph.nodes if node.name == "act")
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(ValueError, match=r"the model is a .* with one graph for training and another for eval mode"):
        tritonq.prepare_qat(made, example_inputs=X)


def test_a_graph_module_that_cannot_be_prepared_keeps_its_forward():
    class Ends(Shortcut):
        def forward(self, x):
            y = super().forward(x).mean((2, 3))
            return self.last(y, y)

    made = fx.symbolic_trace(Ends()).eval()
    expected, code = made(X), made.code
    with pytest.raises(ValueError, match=r"last: Bilinear has no quantized form\. With strict=True"):
        tritonq.prepare_qat(made, example_inputs=X, strict=True, inplace=True)
    assert made.code == code
    assert torch.equal(made(X), expected)


@pytest.mark.parametrize("maker", ["torch.jit", "torch.export"])
def test_what_a_compiler_made_of_a_whole_model_is_refused_with_a_way_out(maker):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(model) if maker == "torch.jit" else torch.export.export(model, (x,)).module()
    with pytest.raises(ValueError, match=f"^{maker} made this .*: prepare the model itself"):
        tritonq.prepare_qat(made, example_inputs=x)


def test_what_is_prepared_in_inference_mode_trains():
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with torch.inference_mode():
        prepared = tritonq.prepare_qat(model, example_inputs=torch.randn(2, 3, 8, 8))
    prepared.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.biases = nn.ParameterDict({"0": nn.Parameter(torch.zeros(4)), "1": nn.Parameter(torch.zeros(4))})

    def forward(self, x):
        for index, weight in enumerate(self.weights):
            x = nn.functional.linear(x, weight, self.biases[str(index)]).relu()
        return x


def test_lists_of_parameters_have_no_row():
    prepared = tritonq.prepare_qat(Lists(), example_inputs=torch.randn(2, 4))
    assert [(row.name, row.status) for row in tritonq.summary(prepared).layers] == [
        ("linear", "quantized"),
        ("linear_1", "quantized"),
    ]
