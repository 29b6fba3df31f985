"""Forwards that no graph stands for keep all their branches; modules answer their additions and concatenations."""

import copy
import re
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
import tritonq.nn as qnn
from prepared_nets import X, conv, of_type, primary, saved_and_loaded
from tolerances import FLOAT32, SUMS, assert_close
from tritonq.prepare import disable_fake_quant, prepare_qat
from tritonq.prepare.forwards.edited import apply_forward, forward_data


class Chunks(nn.Module):
    """A list of chunks that grows (YOLOv8's C2f), an addition in a loop, a ReLU behind the last one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(), nn.Conv2d(6, 4, 1)
        self.inner = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1)])

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(module(parts[-1]) for module in self.inner)
        for _ in range(2):
            parts[0] = parts[0] + parts[1]
        return F.relu(self.last(torch.cat(parts, 1)) + x)


class Targets(nn.Module):
    """Takes a dict with targets or images alone (Ultralytics)."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = conv(), conv()

    def forward(self, x):
        if isinstance(x, dict):
            return self(x["image"]).square().mean()
        return self.head(x + self.conv(x))


class ListArgument(nn.Module):
    """Takes a tensor or a list, and is called with a list of one (timm's SelecSLS)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(), conv(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        if not isinstance(x, list):
            x = [x]
        y = self.conv1(x[0])
        return [self.conv3(torch.cat([y, self.conv2(y)], 1)), *x[1:]]


class TakesList(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ListArgument()

    def forward(self, x):
        return self.block([x])[0]


class Constants(nn.Module):
    """Constants in `**kwargs`, a tuple of ints, an early return."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, size=(6, 6), **options):
        if options.get("skip"):
            return x
        y = self.conv(x) + x
        return F.interpolate(y, size) if tuple(y.shape[2:]) != tuple(size) else y


@dataclass
class Output:
    logits: torch.Tensor
    features: tuple


class Features(nn.Module):
    """A loop over feature maps, and a dataclass as result."""

    def __init__(self):
        super().__init__()
        self.levels, self.lateral = nn.ModuleList([conv(), conv()]), conv()

    def forward(self, x):
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        total = features[0]
        for feature in features[1:]:
            total = self.lateral(total) + feature
        return Output(total, tuple(features))


class BehindBranch(nn.Module):
    """An addition behind a branch, which Dynamo's bytecode has at another offset, before a ReLU that it takes over."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, masks=None):
        maps = [x, self.conv(x)]
        if not torch.jit.is_tracing() and masks is not None:
            maps = [map * masks for map in maps]
        total = maps[0] + maps[1]
        return F.relu(total)


MODELS = {
    "behind a branch": (BehindBranch, 1),
    "chunks": (Chunks, 4),
    "targets": (Targets, 1),
    "list": (TakesList, 1),
    "constants": (Constants, 1),
    "features": (Features, 1),
}


def prepared_model(name):
    torch.manual_seed(0)
    make, joins = MODELS[name]
    model = make()
    prepared = prepare_qat(model, example_inputs=X)
    assert len(of_type(prepared, qnn.Add, qnn.Cat)) == joins
    assert all(record.status == "quantized" for record in prepared.tritonq_report if record.kind in ("add", "cat"))
    return model, prepared


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_joins_are_modules_and_the_forward_computes_the_same(name, training):
    model, prepared = prepared_model(name)
    exact = copy.deepcopy(prepared).train(training)
    disable_fake_quant(exact)
    x = torch.randn(3, 4, 6, 6)
    expected, got = primary(model.train(training)(x)), primary(exact(x))
    assert_close(got, expected, SUMS, size=float(expected.detach().abs().max()))
    seen = []
    for module in prepared.modules():
        if isinstance(module, (qnn.Add, qnn.Cat)):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    prepared(x)
    assert len(seen) == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_converts_and_is_saved(name, tmp_path):
    _, prepared = prepared_model(name)
    prepared.train()
    primary(prepared(X)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    prepared.eval()
    expected = primary(prepared(X))
    converted = tritonq.convert(prepared)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    same = [
        copy.deepcopy(prepared),
        saved_and_loaded(prepared),
        converted,
        tritonq.load_converted(tmp_path / "model.pt", MODELS[name][0]()),
    ]
    for other in same:
        assert torch.equal(primary(other(X)), expected)


@pytest.mark.parametrize("name", ["behind a branch", "chunks", "list", "constants"])
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_in_one_graph(name, training):
    _, prepared = prepared_model(name)
    prepared.train()(X)
    tritonq.disable_observer(prepared.train(training))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="eager")
        assert_close(compiled(X), prepared(X), SUMS)
        if not training:
            converted = tritonq.convert(prepared.eval())
            exported = torch.export.export(converted, (X,), strict=name == "behind a branch").module()
            assert torch.equal(exported(X), prepared(X))


def test_threads_do_not_share_a_run():
    _, prepared = prepared_model("chunks")
    prepared.train()(X)
    prepared.eval()
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(4)]
    expected = [prepared(x) for x in inputs]
    got = [None] * 4

    def run(index):
        for _ in range(5):
            got[index] = prepared(inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings(r"ignore:\d+ calls of the forward")
def test_every_branch_is_still_there():
    _, prepared = prepared_model("targets")
    assert prepared.train()({"image": X}).dim() == 0
    _, prepared = prepared_model("constants")
    disable_fake_quant(prepared)
    assert torch.equal(prepared(X, skip=True), X)
    assert prepared(X, size=(3, 3)).shape[2:] == (3, 3)
    _, prepared = prepared_model("list")
    assert len(prepared.block([X, X])) == 2
    assert len(prepared.block(X)) == 1


class Pooled(nn.Module):
    """A mean over all of an image; it may be left out."""

    def __init__(self, mean):
        super().__init__()
        self.conv, self.head, self.average = conv(), nn.Linear(4, 2), mean

    def forward(self, x, pool=True):
        y = self.conv(x)
        if not pool:
            return y
        if self.average == "avg_pool2d":
            y = F.avg_pool2d(y, y.shape[2:])
        elif self.average == "mean":
            y = y.mean(dim=[-1, -2], keepdim=True)
        else:
            y = F.adaptive_avg_pool2d(y, (1, 1))
        return self.head(y.flatten(1))


@pytest.mark.filterwarnings(r"ignore:\d+ calls of the forward")
@pytest.mark.parametrize("mean", ["avg_pool2d", "adaptive_avg_pool2d", "mean"])
def test_mean_is_answered_by_a_module_and_its_quantizer(mean):
    prepared = prepare_qat(Pooled(mean), example_inputs=X).train()
    prepared(X)
    assert of_type(prepared, qnn.Average) == [mean]
    assert "answers" in forward_data(prepared)
    prepared.eval()
    assert prepared(X, pool=False).dim() == 4
    assert prepared.get_submodule(f"{mean}_fake_quant").has_qparams()
    larger = torch.cat([X, X], 3)
    for images in (X, larger):
        assert torch.equal(tritonq.convert(prepared)(images), prepared(images))


class Halved(Pooled):
    """An output whose size follows the image's: a module of one size computes the recorded one."""

    def forward(self, x, pool=True):
        y = self.conv(x)
        if pool:
            y = F.adaptive_avg_pool2d(y, y.shape[-1] // 2)
        return self.head(y.amax((2, 3)))


def test_an_output_that_follows_the_size_of_the_image_is_computed_as_written_for_another_size():
    torch.manual_seed(0)
    model = Halved("")
    prepared = prepare_qat(model, example_inputs=X).eval()
    assert of_type(prepared, qnn.Average) == ["adaptive_avg_pool2d"]
    disable_fake_quant(prepared)
    larger = torch.cat([X, X], 3)
    model.eval()
    assert torch.equal(prepared(X), model(X))
    with pytest.warns(UserWarning, match="1 calls of the forward"):
        found = prepared(larger)
    assert_close(found, model(larger), FLOAT32)


class Inside(nn.Module):
    """A block within a block of its own class: their calls stand at the same place in the source."""

    def __init__(self, inner=None):
        super().__init__()
        self.conv, self.inner = conv(), inner

    def forward(self, x, last=None):
        y = self.conv(x) if self.inner is None else self.inner(x)
        if last is not None:
            return y
        return y + x


@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
def test_blocks_within_blocks_of_their_class_answer_their_own_calls():
    torch.manual_seed(0)
    model = nn.Sequential(Inside(Inside()), conv())
    prepared = prepare_qat(model, example_inputs=X)
    assert of_type(prepared, qnn.Add) == ["0.inner.add", "0.add"]
    seen = []
    for name, module in prepared.named_modules():
        if isinstance(module, qnn.Add):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    prepared(X)
    assert seen == ["0.inner.add", "0.add"]


@pytest.mark.parametrize(
    "answer",
    [
        *(["delete", "", "", ""], ["replace", "other", "tensors", ""], ["replace", ["conv"], "tensors", ""]),
        *(["run", "", "", "other"], ["run"], "conv"),
    ],
)
def test_damaged_answers_are_refused(answer):
    data = {"version": 2, "eval": None, "train": None, "hidden": [], "answers": {"module:forward:1#0": answer}}
    with pytest.raises(ValueError, match=r"not an answer|doesn't have"):
        apply_forward(Inside(), data)


def test_places_are_lines_and_columns_which_other_versions_of_python_share():
    _, prepared = prepared_model("chunks")
    places = [place for data in map(forward_data, prepared.modules()) for place in (data or {}).get("answers", ())]
    assert places
    assert all(re.fullmatch(r"[\w.]+:[\w.<>]+:\d+\.\d+-\d+\.\d+#\d+", place) for place in places)


class EarlyReturn(nn.Module):
    """Adds unless it is told to stop."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x, stop=False):
        y = self.first(x)
        if stop:
            return y
        return self.second(y) + x


def test_a_recorded_call_that_never_comes_is_told_once():
    prepared = tritonq.prepare_qat(EarlyReturn(), example_inputs=X).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(X)
    with pytest.warns(UserWarning, match=r"1 calls of the forward of EarlyReturn .* did not come, .* \(add\)"):
        prepared(X, stop=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(X, stop=True)


def test_a_compiled_call_that_never_comes_is_told():
    prepared = tritonq.prepare_qat(EarlyReturn(), example_inputs=X).eval()
    compiled = torch.compile(prepared, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match=r"1 calls of the forward of EarlyReturn .* did not come, .* \(add\)"):
        compiled(X, stop=True)


class ExitsEarly(nn.Module):
    """A branch that depends on values: compilers break the graph there."""

    def __init__(self):
        super().__init__()
        self.first = conv()

    def forward(self, x):
        y = self.first(x)
        if y.mean() > 100:
            return y
        return y + x


def test_calls_behind_a_graph_break_are_answered():
    prepared = tritonq.prepare_qat(ExitsEarly(), example_inputs=X).train()
    prepared(X)
    with torch.no_grad():
        expected = prepared.eval()(X)
        assert torch.equal(torch.compile(prepared, backend="eager")(X), expected)
