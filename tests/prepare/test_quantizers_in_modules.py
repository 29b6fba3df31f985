"""Quantizers belong to the modules that read or write a tensor: no way of running these leaves one out."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint_sequential

import tritonq
from prepared_nets import X, conv, quantizers

Y = torch.randn(2, 4, 6, 6)


class Net(nn.Module):
    """An input read by two layers and a sum, a ReLU that no layer takes, a mean."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()
        self.softsign, self.head = nn.Softsign(), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x) + self.second(x) + x
        return self.head(self.third(self.softsign(y)).mean((2, 3)))


class Items(nn.ModuleDict):
    """Runs its items in turn, as timm's features_only and torchvision's IntermediateLayerGetter do."""

    def forward(self, x):
        found = []
        for name, child in self.items():
            x = child(x)
            if name != "act":
                found.append(x)
        return torch.cat(found, 1)


class Detector(nn.Module):
    """Calls its own forward, as Ultralytics does in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.head = conv(), nn.ReLU(), conv()

    def forward(self, x):
        if isinstance(x, dict):
            return self.forward(x["img"]).mean()
        return self.head(self.relu(self.conv(x)))


def sequential():
    return nn.Sequential(conv(), nn.Softplus(), conv(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def prepared(model, run=None):
    """The prepared model after one step in training mode, and the names of quantizers that observed nothing."""
    torch.manual_seed(0)
    made = tritonq.prepare_qat(model.train(), example_inputs=X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    (made(X) if run is None else run(made)).sum().backward()
    return made, [name for name, module in quantizers(made).items() if not module.has_qparams()]


RUNS = {
    "call": (Net, None),
    "forward": (Net, lambda m: m.forward(X)),
    "inside": (Detector, lambda m: m({"img": X})),
    "items": (lambda: Items({"conv": conv(), "act": nn.ReLU(), "last": conv()}), None),
    "children": (sequential, lambda m: nn.Sequential(*list(m.children()))(X)),
    "checkpoint": (sequential, lambda m: checkpoint_sequential(m, 2, X, use_reentrant=False)),
    "graph": (lambda: fx.symbolic_trace(Net()), None),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_quantizer_runs_and_the_converted_model_agrees(name):
    model, unseen = prepared(RUNS[name][0](), RUNS[name][1])
    assert unseen == []
    assert tritonq.verify(model, tritonq.convert(model.eval()), Y).agrees()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "inside another": lambda model: nn.Sequential(OrderedDict(inner=model)),
}


@pytest.mark.parametrize("kind", ["call", "items", "graph"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_with_every_quantizer(kind, how):
    model, _ = prepared(RUNS[kind][0]())
    twin = COPIES[how](model.eval())
    assert torch.equal(twin(Y), model(Y))
    assert len(quantizers(twin)) == len(quantizers(model))
    if how != "inside another":
        twice = copy.deepcopy(pickle.loads(pickle.dumps(twin)))
        assert torch.equal(twice(Y), model(Y))


@pytest.mark.parametrize("kind", ["call", "items", "graph"])
def test_converted_models_are_saved_and_loaded(kind, tmp_path):
    model, _ = prepared(RUNS[kind][0]())
    converted = tritonq.convert(model.eval())
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", RUNS[kind][0]())
    assert torch.equal(loaded(Y), converted(Y))


def test_readers_of_one_tensor_share_a_quantizer_that_one_of_them_observes():
    model, _ = prepared(Net())
    shared = model.first.input_fake_quant
    assert shared is model.second.input_fake_quant
    assert shared is model.add_1.input_fake_quant_1
    model(1.2 * X)
    constant = shared.activation_post_process.averaging_constant
    expected = X.max() + constant * (1.2 * X.max() - X.max())
    torch.testing.assert_close(shared.activation_post_process.max_val, expected)


def test_parts_of_the_input_have_quantizers_of_their_own():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x):
            a, b = x.chunk(2, 1)
            return self.first(a) + self.second(b)

    model, _ = prepared(Parts())
    found = [layer.input_fake_quant.activation_post_process.max_val for layer in (model.first, model.second)]
    assert found == [X[:, :2].max(), X[:, 2:].max()]


def test_code_that_walks_children_meets_those_of_the_float_model():
    model, _ = prepared(Net())
    assert [name for name, _ in model.named_children()] == [name for name, _ in Net().named_children()]
    assert list(model.softsign.children()) == []
    hidden = model.add
    model.eval()
    assert not hidden.training
    model.half()
    visited = []
    model.apply(visited.append)
    assert any(module is hidden for module in visited)
    float_items = Items({"conv": conv(), "act": nn.ReLU(), "last": conv()})
    items, _ = prepared(float_items)
    assert list(items) == list(items.keys()) == ["conv", "act", "last"]
    assert len(items) == len(items.values()) == 3
    assert "cat" in items._modules


def test_a_container_whose_forward_is_not_traced_quantizes_what_it_returns():
    class Untraced(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return F.softplus(self.conv(x)) if x.shape[0] > 0 else x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Untraced(), conv()

        def forward(self, x):
            return self.last(self.inner.forward(x))  # not called as a module

    model, unseen = prepared(Outer())
    assert unseen == []
    assert tritonq.verify(model, tritonq.convert(model.eval()), Y).agrees()


def test_keys_of_inputs_that_the_first_version_wrote_are_read():
    model, _ = prepared(Net())
    state = model.state_dict()
    names = ["first.input_fake_quant.", "second.input_fake_quant.", "add_1.input_fake_quant_1."]
    earlier = {key: value for key, value in state.items() if not key.startswith(tuple(names))}
    for key, value in state.items():
        if key.startswith(names[0]):
            earlier["input_fake_quants.x." + key.removeprefix(names[0])] = value
    file = io.BytesIO()
    torch.save(earlier, file)
    file.seek(0)
    fresh = copy.deepcopy(tritonq.prepare_qat(Net(), example_inputs=X))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.eval()(Y), model.eval()(Y))
    outer = nn.Sequential(tritonq.prepare_qat(Net(), example_inputs=X))
    outer.load_state_dict({f"0.{key}": value for key, value in earlier.items()})
    assert torch.equal(outer.eval()(Y), model(Y))
