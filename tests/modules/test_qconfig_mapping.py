"""Rules that choose a qconfig per layer, and the JSON files that hold them."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

import tritonq
from qat_models import FloatResidual, assert_same_state, images, state_of
from tritonq import QConfig, QConfigMapping
from tritonq.qconfig import PRESETS
from tritonq.quantized_type import QuantizedType

MAIN = tritonq.get_qconfig("onnxruntime")
OTHER = tritonq.get_qconfig("megengine_ema")


def chosen(model, mapping, **arguments):
    """Quantized layers of the prepared model, by name, with their qconfigs."""
    prepared = tritonq.prepare_qat(model, qconfig=mapping, **arguments)
    return {name: part.qconfig for name, part in prepared.named_modules() if isinstance(part, tritonq.nn.QATLayer)}


def whole(mapping):
    return chosen(FloatResidual(), mapping, example_inputs=images(2))


LAYERS = {"stem.0", "depthwise", "point", "head"}


def test_the_global_qconfig_is_every_layers():
    assert whole(QConfigMapping().set_global(MAIN)) == dict.fromkeys(LAYERS, MAIN)


def test_a_name_a_pattern_and_a_type_leave_layers_in_float():
    base = QConfigMapping().set_global(MAIN)
    assert set(whole(base.set_module_name("point", None))) == LAYERS - {"point"}
    assert set(whole(base.set_module_name("stem", None))) == LAYERS - {"stem.0"}
    assert set(whole(base.set_module_name_regex(r"(depth|po)", None))) == LAYERS - {"depthwise", "point"}
    for kind in (nn.Linear, "Linear", "torch.nn.Linear"):
        assert set(whole(base.set_object_type(kind, None))) == LAYERS - {"head"}


def test_the_strongest_rule_wins():
    mapping = QConfigMapping().set_object_type(nn.Conv2d, OTHER)
    assert whole(mapping) == dict.fromkeys(LAYERS - {"head"}, OTHER)
    mapping = mapping.set_module_name_regex(".*i", MAIN)
    assert whole(mapping) == {"stem.0": OTHER, "depthwise": MAIN, "point": MAIN}
    mapping = mapping.set_first_layer(None).set_last_layer(OTHER)
    assert whole(mapping) == {"depthwise": MAIN, "point": MAIN, "head": OTHER}
    mapping = mapping.set_module_name("stem", MAIN).set_module_name("point", None)
    assert whole(mapping) == {"stem.0": MAIN, "depthwise": MAIN, "head": OTHER}


def test_the_first_pattern_that_fits_wins_and_the_nearest_type():
    mapping = QConfigMapping().set_module_name_regex("po", MAIN).set_module_name_regex("p.*", None)
    assert whole(mapping) == {"point": MAIN}
    mapping = QConfigMapping().set_object_type(nn.Sequential, MAIN).set_object_type(FloatResidual, OTHER)
    assert whole(mapping) == {"stem.0": MAIN, "depthwise": OTHER, "point": OTHER, "head": OTHER}


def test_a_name_rule_may_have_any_path_of_a_shared_module():
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["second"] = model["first"]
    resolved = QConfigMapping().set_global(MAIN).set_module_name("second", None).resolve(model)
    assert resolved[model["first"]] is None


def test_first_and_last_follow_execution_not_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.b(self.a(x))

    mapping = QConfigMapping().set_global(MAIN).set_first_layer(None)
    assert set(chosen(Backwards(), mapping, example_inputs=torch.randn(2, 3))) == {"b"}
    with pytest.raises(ValueError, match="pass example_inputs"):
        tritonq.prepare_qat(Backwards(), qconfig=mapping)


def test_the_eager_flow_takes_mappings_too():
    model = nn.Sequential(tritonq.nn.QuantStub(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    mapping = QConfigMapping().set_global(MAIN).set_module_name("3", OTHER)
    assert chosen(model, mapping) == {"1": MAIN, "3": OTHER}


def test_attributes_of_the_model_win():
    model = FloatResidual()
    model.stem.qconfig, model.head.qconfig = None, OTHER
    mapping = QConfigMapping().set_global(MAIN).set_module_name("head", None)
    assert chosen(model, mapping, example_inputs=images(2)) == {"depthwise": MAIN, "point": MAIN, "head": OTHER}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (QConfigMapping().set_module_name("stem.O", MAIN), "no module is called 'stem.O'; did you mean .*'stem.0'"),
        (
            QConfigMapping().set_module_name_regex(r"dept\.", MAIN),
            r"'dept\\\\.' matches no .*; did you mean 'depthwise'",
        ),
        (QConfigMapping().set_object_type(nn.Conv1d, MAIN), "no module of type .*Conv1d'; did you mean 'Conv2d'"),
        (QConfigMapping(), "has no rule"),
    ],
)
def test_a_rule_that_fits_nothing_is_a_typo(mapping, message):
    model = FloatResidual()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        tritonq.prepare_qat(model, qconfig=mapping, example_inputs=images(2), inplace=True)
    assert_same_state(before, state_of(model))


def test_wrong_arguments():
    for wrong in (lambda m: m.set_global("tensorrt"), lambda m: m.set_object_type(torch.add, MAIN)):
        with pytest.raises(TypeError, match="must be a"):
            wrong(QConfigMapping())
    with pytest.raises(TypeError, match="a pattern is a string"):
        QConfigMapping().set_module_name_regex(b"conv", MAIN)
    with pytest.raises(ValueError, match="not a regular expression"):
        QConfigMapping().set_module_name_regex("(", MAIN)
    with pytest.raises(ValueError, match="qualified name"):
        QConfigMapping().set_module_name("", MAIN)


# Every public class of quantizers.
QUANTIZERS = [name for name in tritonq.__all__ if name.endswith("FakeQuantize")]


def rules():
    own = QConfig(
        tritonq.LearnedStepFakeQuantize.with_args(
            dtype=QuantizedType.of(4, signed=False), observer=tritonq.MinMaxObserver
        ),
        tritonq.FakeQuantize.with_args(
            observer=tritonq.HistogramObserver.with_args(search="percentile", percentile=99.9),
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
    )
    mapping = QConfigMapping().set_global(own).set_first_layer(None).set_last_layer(MAIN)
    for name, preset in PRESETS.items():
        mapping = mapping.set_module_name(f"block.{name}", preset)
    for version in (0, 1):
        mapping = mapping.set_module_name_regex(f"v{version}", tritonq.get_default_qat_qconfig("qnnpack", version))
    for name in QUANTIZERS:
        make = getattr(tritonq, name)
        make = make.with_args(format="fp6_e3m2") if name == "FloatFakeQuantize" else make
        mapping = mapping.set_module_name(f"own.{name}", QConfig(nn.Identity, make))
    bare = QConfig(nn.Identity, tritonq.FakeQuantize)
    return mapping.set_object_type(nn.Conv2d, None).set_object_type("my.models.Block", bare)


def test_files_hold_every_preset_and_factory(tmp_path):
    mapping = rules()
    tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    loaded = tritonq.load_qconfig_mapping(tmp_path / "q.json")
    assert loaded == mapping
    assert pickle.loads(pickle.dumps(mapping)) == mapping
    content = json.loads((tmp_path / "q.json").read_text())
    assert content["last"] == {"preset": "onnxruntime"}
    assert content["first"] is None
    assert dict(content["patterns"])["v0"] == {"preset": "qnnpack", "version": 0}


def test_a_loaded_mapping_prepares_the_same_model(tmp_path):
    mapping = QConfigMapping().set_global(MAIN).set_last_layer(None).set_module_name("point", OTHER)
    tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    assert whole(tritonq.load_qconfig_mapping(tmp_path / "q.json")) == whole(mapping)


@pytest.mark.parametrize(
    "activation",
    [
        lambda: nn.Identity(),
        nn.ReLU,
        tritonq.FakeQuantize.with_args(observer=nn.ReLU),
        tritonq.FakeQuantize.with_args(eps=[1]),
    ],
    ids=["function", "foreign class", "foreign observer", "list"],
)
def test_what_json_cannot_hold_is_refused(activation, tmp_path):
    mapping = QConfigMapping().set_module_name("stem", QConfig(activation, MAIN.weight))
    with pytest.raises(ValueError, match="of names 'stem' can't be saved"):
        tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    assert not list(tmp_path.iterdir())


IDENTITY = {"class": "Identity"}
UNKNOWN = {"dtype": {"dtype": "x"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global": {"preset": "int7"}}, "global names an unknown preset .*known: onnxruntime, tensorrt"),
        ({"global": {"preset": "fbgemm", "version": 2}}, "unknown preset"),
        ({"global": {"preset": ["tensorrt"]}}, "unknown preset"),
        ({"global": {"activation": {"class": "os.system"}, "weight": IDENTITY}}, "class 'os.system'; known: Binary"),
        ({"global": {"activation": IDENTITY}}, "fields activation and weight"),
        ({"global": {"activation": "Identity", "weight": IDENTITY}}, "must name a class"),
        ({"global": {"activation": {"class": "MinMaxObserver"}, "weight": IDENTITY}}, "must make a fake quantizer"),
        (
            {"global": {"activation": {"class": "FakeQuantize", "arguments": {"dtype": "int3"}}, "weight": IDENTITY}},
            "activation of global can't be made: unknown quantized type 'int3'",
        ),
        (
            {"names": [["a", {"activation": {"class": "FakeQuantize", "arguments": UNKNOWN}, "weight": IDENTITY}]]},
            "names 'a' names an unknown dtype 'x'",
        ),
        ({"names": ["a"]}, r"must hold \[key, qconfig\]"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"version": 2}, "version 2"),
        ({"format": "x"}, "no format"),
    ],
)
def test_files_that_make_no_mapping_are_refused(change, message, tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"format": "tritonq.qconfig_mapping", "version": 1, **change}))
    with pytest.raises(ValueError, match=message):
        tritonq.load_qconfig_mapping(path)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "q.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tritonq.load_qconfig_mapping(tmp_path / "q.json")


def test_files_of_version_0_1_0_hold_types_whose_rounding_stood_beside_them(tmp_path):
    qtype = {"quant_min": -8, "quant_max": 7, "symmetric": True, "axis": None, "rounding": "half_even"}
    activation = {
        "class": "FakeQuantize",
        "arguments": {"dtype": {"quantized_type": qtype}, "rounding": "half_away", "rule": "megengine"},
    }
    weight = {"class": "TrainedThresholdFakeQuantize", "arguments": {"dtype": {"quantized_type": qtype}}}
    file = tmp_path / "mapping.json"
    data = {"format": "tritonq.qconfig_mapping", "version": 1, "global": {"activation": activation, "weight": weight}}
    file.write_text(json.dumps(data))
    qconfig = tritonq.load_qconfig_mapping(file).global_rule.qconfig
    for made in (qconfig.activation(), qconfig.weight()):
        assert made.qtype == tritonq.QuantizedType(-8, 7, rounding="half_away")


class Detector(nn.Module):
    """A backbone and a head with the children of Ultralytics'; `whole` is the prototypes' of masks."""

    class Head(nn.Module):
        stride = torch.tensor([8.0])

        def __init__(self) -> None:
            super().__init__()
            ends = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)), nn.Conv2d(4, 2, 1))
            self.cv2, self.cls_preds = (nn.ModuleList([end]) for end in ends)
            self.stems = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])
            self.dfl = nn.Sequential(nn.Conv2d(8, 8, 1))
            self.whole = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stems[0](x)
            return torch.cat([self.dfl(self.cv2[0](x)) + 1, self.cls_preds[0](x), self.whole(x)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.stride = 8  # as whole models have it too
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), self.Head())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_detector_keeps_what_makes_boxes_in_float():
    model = Detector()
    found = chosen(model, tritonq.get_yolo_qconfig_mapping(model, "onnxruntime"), example_inputs=images(2), warn=False)
    assert found == dict.fromkeys(("layers.0", "layers.1.stems.0.0", "layers.1.cv2.0.0", "layers.1.whole"), MAIN)
    head = model.layers[1]
    maps = torch.randn(2, 4, 4, 4)
    alone = chosen(head, tritonq.get_yolo_qconfig_mapping(head), example_inputs=maps, warn=False)
    assert {"stems.0.0", "cv2.0.0"} <= set(alone)
    assert not {"cv2.0.2", "cls_preds.0", "dfl.0"} & set(alone)
    with pytest.raises(ValueError, match="no head of a detector in this FloatResidual"):
        tritonq.get_yolo_qconfig_mapping(FloatResidual())
