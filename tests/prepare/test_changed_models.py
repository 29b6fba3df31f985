"""Modules put into a prepared model, or around its modules: adapters, wrappers, new heads."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tritonq
from prepared_nets import X, conv
from qat_models import train

pytestmark = pytest.mark.filterwarnings("ignore:no training step reached")


class Adapter(nn.Module):
    """A layer with two small ones beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.unused = nn.ParameterDict()  # as peft's adapters have
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Module):
    def __init__(self, inner, factor=3.0):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


TOKENS = torch.randn(4, 5, 8)


def attending():
    return tritonq.prepare_qat(
        nn.Sequential(nn.Linear(8, 8), Attention(), nn.Linear(8, 4)), example_inputs=TOKENS
    ).train()


def adapted():
    model = attending()
    model[1].q, model[1].v = Adapter(model[1].q), Adapter(model[1].v)
    return train(model, TOKENS)


@pytest.mark.filterwarnings("ignore:Adapter was put:UserWarning")
@pytest.mark.filterwarnings("ignore:4 modules were put:UserWarning")
def test_attention_behind_an_adapter_computes_as_in_training(tmp_path):
    model = adapted()
    scores = model[1].scaled_dot_product_attention.scores
    read = []
    scores.register_forward_pre_hook(lambda module, given: read.append(given))
    model(TOKENS)
    query, key = read[0]
    assert torch.equal(scores(query, key), scores.activation_post_process(query @ key))
    scores._forward_pre_hooks.clear()
    converted = tritonq.convert(model)
    assert torch.equal(converted(TOKENS), model(TOKENS))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", TOKENS)
    assert tritonq.verify(model, tmp_path / "model.onnx", TOKENS).agrees()


def test_adapters_are_told_and_listed():
    with pytest.warns(UserWarning, match=r"Adapter was put in the place of '1\.q' after prepare_qat"):
        model = adapted()
    rows = {row.name: row for row in tritonq.summary(model).layers}
    assert {rows[f"1.{part}.{layer}"].status for part in "qv" for layer in ("down", "up")} == {"float"}
    assert rows["1.q.up"].reason == "it was put into the model after prepare_qat"
    assert rows["1.q.base"].status == rows["1.k"].status == "quantized"
    assert "1.q" not in rows
    reason = rows["1.scaled_dot_product_attention"].reason
    assert "Adapter was put in the place of '1.v'; Adapter was put in the place of '1.q'" in reason
    with pytest.warns(UserWarning, match=r"4 modules were put into the model after prepare_qat \(1\.q\.down, "):
        converted = tritonq.convert(model)
    assert {row.name: row.status for row in tritonq.summary(converted).layers} == {
        row.name: row.status for row in tritonq.summary(model).layers
    }


@pytest.mark.filterwarnings("ignore:Scaled was put:UserWarning")
@pytest.mark.parametrize("at", ["writer", "between", "reader", "outside"])
def test_wrappers_that_change_a_tensor_take_no_grid_for_granted(at):
    blocks = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.MaxPool2d(1), nn.Sequential(conv(), nn.ReLU()))
    model = tritonq.prepare_qat(blocks, example_inputs=X).train()
    model(X)
    if at == "writer":
        model[0] = Scaled(model[0])
    elif at == "between":
        model[1] = Scaled(nn.Identity())
    elif at == "reader":
        model[2][0] = Scaled(model[2][0])
    else:
        model = Scaled(model)
    model.eval()
    integers = {name for name, module in model.named_modules() if getattr(module, "input_quantizer", None) is not None}
    assert len(integers) == (2 if at == "outside" else 1)
    assert torch.equal(tritonq.convert(model)(X), model(X))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_of_torch_hand_grids_on(wrap):
    blocks = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(conv(), nn.ReLU()))
    model = tritonq.prepare_qat(blocks, example_inputs=X).train()
    plain = model(X)
    inner = model[0]
    model[0] = wrap(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(model(X), plain)
        assert model[1][0].input_quantizer is inner[0].activation_post_process
        tritonq.convert(model.eval())


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("kind", ["graph", "attention"])
def test_other_classes_of_torch_hand_no_grid_on(kind):
    model = tritonq.prepare_qat(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), example_inputs=torch.randn(3, 4))
    model(torch.randn(3, 4))
    assert model[1].input_quantizer is not None
    inner = model[0]
    if kind == "graph":
        model[0] = fx.GraphModule(Twice(inner), fx.Tracer().trace(Twice(nn.ReLU())))
    else:
        model[0] = nn.MultiheadAttention(4, 2)
        model[0].out_proj = inner
    with pytest.warns(UserWarning, match="was put in the place of '0' after prepare_qat"):
        assert model[1].input_quantizer is None


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_notice_their_own_changes_alone(through):
    model = attending()
    other = through(model)
    other[1].q = Adapter(other[1].q)
    attention, copied = model[1].scaled_dot_product_attention, other[1].scaled_dot_product_attention
    assert attention.scores.producers[0] is model[1].q
    with pytest.warns(UserWarning, match="Adapter was put"):
        assert copied.scores.producers[0] is None
    assert copied.scores.producers[1] is other[1].k


def test_a_new_head_is_told(tmp_path):
    model = attending()
    model(TOKENS)
    model[2] = nn.Linear(8, 3)
    model(TOKENS).square().mean().backward()
    assert [row.name for row in tritonq.summary(model).in_float] == ["2"]
    with pytest.warns(UserWarning, match=r"1 modules were put into the model after prepare_qat \(2\)"):
        converted = tritonq.convert(model.eval())
    assert tritonq.verify(model, converted, TOKENS).agrees()
    tritonq.export_onnx(converted, tmp_path / "model.onnx", TOKENS)
    assert tritonq.verify(model, tmp_path / "model.onnx", TOKENS).agrees()


def test_a_model_that_lost_a_part_loads_its_state():
    def block():
        return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())

    model = nn.Sequential(block(), block(), nn.Flatten())
    prepared = tritonq.prepare_qat(model, example_inputs=X)
    prepared[1] = nn.Identity()
    prepared.load_state_dict(prepared.state_dict())
    float_state = {name: value for name, value in model.state_dict().items() if name.startswith("0.1.")}
    float_state["0.1.running_mean"] = torch.full((4,), 3.0)
    prepared.load_state_dict(float_state, strict=False)
    assert prepared[0][0].bn.running_mean.tolist() == [3.0] * 4


def test_what_had_become_part_of_a_replaced_layer_is_told():
    model = tritonq.prepare_qat(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()), example_inputs=X).train()
    model[0] = nn.Conv2d(4, 4, 3)
    rows = {row.name: row.reason for row in tritonq.summary(model).in_float}
    assert rows["0"] == "it was put into the model after prepare_qat"
    assert rows["1"] == rows["2"] == "it had become part of 0, which is gone: it does nothing now"
    with pytest.warns(UserWarning, match=r"1, 2 had become part of layers that are gone, and nothing does their work"):
        tritonq.convert(model.eval())


def test_a_model_inside_of_another_is_told_by_its_names_there():
    model = nn.Sequential(attending(), nn.Linear(4, 2))
    assert {"0.1.q", "0.2"} <= {row.name for row in tritonq.summary(model).quantized}


def test_a_changed_fixed_point_network_is_refused():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    model = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig("f8net"), example_inputs=X)
    model(X)
    model[4] = nn.Linear(144, 3)
    with pytest.raises(ValueError, match="'4' was put into the model after prepare_qat"):
        tritonq.convert(model.eval())


def test_parametrizations_and_shifted_places_are_listed_as_they_are():
    net = nn.Sequential(conv(), nn.ReLU(), nn.Identity(), conv(), nn.ReLU())
    model = tritonq.prepare_qat(net, example_inputs=X).train()
    nn.utils.parametrizations.weight_norm(model[3])
    assert [row.name for row in tritonq.summary(model).quantized] == ["0", "3"]
    assert not tritonq.summary(model).in_float
    assert model[3].input_quantizer is model[0].activation_post_process
    del model[2]
    assert [row.name for row in tritonq.summary(model).quantized] == ["0"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert model[2].input_quantizer is None
    assert not told  # the summary has
