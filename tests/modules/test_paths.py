"""Which path a layer takes: the whole decision as a table, and that layers in these states take it."""

from typing import get_args

import pytest
import torch
from torch import nn

import tritonq
from tritonq.nn.paths import LayerState, Path, choose_path

CASES = {
    "train": [{"training": True}, {"training": True, "tracing": True}, {"training": True, "frozen": True}],
    "train_frozen": [
        {"training": True, "mode": "approximate", "frozen": True, "fits_operator": True},
        {"training": True, "mode": "exact", "frozen": True},
    ],
    "train_operator": [
        {"training": True, "mode": "approximate", "fits_operator": True},
        {"training": True, "mode": "approximate", "fits_operator": True, "tracing": True},
    ],
    "train_approximate": [{"training": True, "mode": "approximate"}],
    "train_exact": [{"training": True, "mode": "exact"}, {"training": True, "mode": "exact", "fits_operator": True}],
    "train_corrected": [{"training": True, "mode": "corrected"}],
    "train_scale": [{"training": True, "mode": "scale"}, {"training": True, "mode": "scale", "fits_operator": True}],
    "eval_traced": [{"training": False, "tracing": True}, {"training": False, "tracing": True, "mode": "exact"}],
    "eval_integers": [
        {"training": False, "knows_grids": True},
        {"training": False, "knows_grids": True, "mode": "approximate", "frozen": True, "fits_operator": True},
    ],
    "eval_float": [{"training": False}, {"training": False, "mode": "corrected", "frozen": True}],
}


@pytest.mark.parametrize(("path", "state"), [(path, state) for path, states in CASES.items() for state in states])
def test_the_table(path, state):
    assert choose_path(LayerState(**state)) == path


def test_the_table_is_whole():
    assert set(CASES) == set(get_args(Path))


def layer_of(**arguments):
    torch.manual_seed(0)
    qconfig = tritonq.get_qconfig("tensorrt")
    layer = tritonq.nn.ConvBn2d(3, 4, 3, qconfig=qconfig, **arguments)
    source = qconfig.activation()
    layer.set_input_quantizer(source)
    layer(source(torch.randn(2, 3, 6, 6)))
    return layer, source


def path_of(layer):
    return choose_path(layer.path_state())


def test_a_layer_describes_its_state():
    layer, source = layer_of()
    assert path_of(layer) == "train_operator"
    hook = layer.bn.register_forward_hook(lambda *_: None)
    assert path_of(layer) == "train_approximate"
    hook.remove()
    assert path_of(layer) == "train_operator"
    layer.mode = "exact"
    assert path_of(layer) == "train_exact"
    layer.freeze_bn_stats()
    assert path_of(layer) == "train_frozen"
    layer.eval()
    assert path_of(layer) == "eval_integers"
    for quantizer in (source, layer.weight_fake_quant):
        quantizer.disable_fake_quant()
        assert path_of(layer) == "eval_float"
        quantizer.enable_fake_quant()
    layer.set_input_quantizer(None)
    assert path_of(layer) == "eval_float"


def test_a_quantizer_that_no_operator_knows_trains_in_several():
    class Observer(tritonq.MinMaxObserver):
        pass

    qconfig = tritonq.QConfig(nn.Identity, tritonq.FakeQuantize.with_args(observer=Observer, dtype=torch.qint8))
    assert path_of(tritonq.nn.ConvBn2d(3, 4, 3, qconfig=qconfig)) == "train_approximate"
    floating = tritonq.QConfig(nn.Identity, nn.Identity)
    assert path_of(tritonq.nn.ConvBn2d(3, 4, 3, qconfig=floating)) == "train_operator"


@pytest.mark.parametrize("kind", [tritonq.nn.Conv2d, tritonq.nn.ConvBn2d, tritonq.nn.QATRepVGGBlock])
def test_a_layer_takes_the_path_that_was_chosen(kind, monkeypatch):
    """A path that is replaced changes what the layer returns: nothing decides behind it."""
    arguments = () if kind is tritonq.nn.QATRepVGGBlock else (3,)
    layer = kind(3, 4, *arguments, qconfig=tritonq.get_qconfig("tensorrt"))
    for training in (True, False):
        layer.train(training)
        path = path_of(layer)
        monkeypatch.setitem(layer.paths, path, lambda layer, x, weight, bias, path=path: path)
        assert layer(torch.randn(2, 3, 6, 6)) == path
