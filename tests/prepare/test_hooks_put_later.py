"""Hooks that users put on a prepared model: those that change a tensor are noticed, others change nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tritonq
from prepared_nets import X, conv
from qat_models import after_one_batch

pytestmark = pytest.mark.filterwarnings("ignore:no training step reached")


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.pool, self.inner = nn.SiLU(), nn.MaxPool2d(1), nn.Sequential(conv(), nn.ReLU())

    def forward(self, x):
        x = self.pool(self.act(x))
        return x + self.inner(x)


def prepared():
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), Shortcut(), nn.Sequential(conv(), nn.ReLU()))
    return after_one_batch(model, X)


def doubled(module, given, result):
    return result * 3.3


def doubled_in_place(module, given, result):
    result.mul_(3.3)


def doubled_given(module, given):
    return tuple(item * 3.3 for item in given)


def put(model, place, hook):
    module = model.get_submodule(place)
    before = hook is doubled_given
    return module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)


class Scaled(nn.Module):
    """What a module with one of the hooks computes."""

    def __init__(self, inner, before):
        super().__init__()
        self.inner, self.before = inner, before

    def forward(self, x):
        return self.inner(x * 3.3) if self.before else self.inner(x) * 3.3


@pytest.mark.filterwarnings("ignore:Scaled was put:UserWarning")
@pytest.mark.parametrize("hook", [doubled, doubled_in_place, doubled_given])
@pytest.mark.parametrize("place", ["0", "0.0", "1", "1.pool", "1.inner", "1.inner.0", "2", "2.0"])
def test_a_hook_that_changes_a_tensor_counts_as_a_wrapper_does(place, hook):
    hooked = prepared()
    wrapped = copy.deepcopy(hooked)
    put(hooked, place, hook)
    wrapped.set_submodule(place, Scaled(wrapped.get_submodule(place), hook is doubled_given))
    with torch.no_grad():
        wanted = wrapped(X)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = [hooked(X) for _ in range(2)]
    ends = place in ("2", "2.0") and hook is not doubled_given
    begins = place in ("0", "0.0") and hook is doubled_given  # the input is rounded behind it
    # A wrapper takes grids from its inside, too: floats may be rounded to the code beside the integers'.
    step = float(hooked[2][0].activation_post_process.scale)
    for y in found:
        assert float((y - wanted).abs().max()) < 2.5 * step * (3.3 if ends else 1)
    texts = [str(warning.message) for warning in told]
    assert len(texts) == (0 if ends or begins else 1)
    assert all(f"a hook that changes tensors was put on '{place}' after prepare_qat" in text for text in texts)


@pytest.mark.parametrize("result", ["nothing", "the same"])
def test_hooks_that_only_look_change_nothing(result):
    model, seen = prepared(), []
    with torch.no_grad():
        wanted = model(X)

    def look(module, given, returned):
        seen.append(returned)
        return None if result == "nothing" else returned

    def look_before(module, given):
        seen.append(given)
        return None if result == "nothing" else given

    for module in list(model.modules()):
        module.register_forward_hook(look)
        module.register_forward_pre_hook(look_before)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(model(X), wanted)
        assert torch.equal(model(X), wanted)
        assert torch.equal(tritonq.convert(model)(X), wanted)
    assert seen


def test_what_a_hook_takes_from_a_layer_is_listed_and_comes_back():
    model = prepared()
    with torch.no_grad():
        wanted = model(X)
    handle = put(model, "1.pool", doubled)
    with pytest.warns(UserWarning, match=r"a hook that changes tensors was put on '1\.pool' after prepare_qat"):
        model(X)
    rows = {row.name: row for row in tritonq.summary(model).layers}
    assert rows["1.inner.0"].reason == (
        "computes in float: after prepare_qat a hook that changes tensors was put on '1.pool'"
    )
    assert rows["2.0"].reason == ""
    assert [row.reason for row in tritonq.summary(copy.deepcopy(model)).layers] == [row.reason for row in rows.values()]
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(X), wanted)


def test_compiled_models_read_what_a_hook_changed():
    model = prepared()
    put(model, "1.pool", doubled)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, step = model(X), float(model[2][0].activation_post_process.scale)
        assert float((compiled(X) - wanted).abs().max()) < 2.5 * step
