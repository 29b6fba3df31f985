"""Files of earlier versions are read, and their models compute what they did; `golden.files` says what is in them."""

from pathlib import Path

import pytest
import torch

import tritonq
from golden.files import MODELS, PICKLED, frozen_layer, inputs, load, mapping, results_of
from golden.models import prepared

VERSIONS = sorted(folder for folder in (Path(__file__).parent.parent / "data").iterdir() if folder.is_dir())
pytestmark = pytest.mark.parametrize("folder", VERSIONS, ids=[folder.name for folder in VERSIONS])


def expected(folder, name):
    return torch.load(folder / "expected.pt")[name]


def loaded(folder, name):
    """A model prepared today, with the state of a file."""
    kind, preset = MODELS[name]
    model = prepared(kind(), preset)
    model.load_state_dict(load(folder / f"{name}.qat.pt.gz"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_of_prepared_models(folder, name):
    model = loaded(folder, name)
    assert results_of(model)[""] == expected(folder, f"{name}.qat")[""]
    converted = results_of(tritonq.convert(model))
    assert converted[""] == expected(folder, f"{name}.converted")[""]


@pytest.mark.parametrize("name", PICKLED)
def test_models_pickled_whole(folder, name):
    model = load(folder / f"{name}.pickle.pt.gz", weights_only=False)
    assert results_of(model)[""] == expected(folder, f"{name}.qat")[""]
    assert results_of(tritonq.convert(model))[""] == expected(folder, f"{name}.converted")[""]


@pytest.mark.parametrize("name", MODELS)
def test_converted_models(folder, name):
    kind, _ = MODELS[name]
    converted = tritonq.load_converted(folder / f"{name}.converted.pt", kind())
    results, then = results_of(converted), expected(folder, f"{name}.converted")
    assert len(then) > 5
    assert {part: results[part] for part in then} == then
    if name != "fixed_point_f8net":
        report = tritonq.verify(loaded(folder, name), converted, inputs())
        assert report.first_difference is None


def test_frozen_batch_norm(folder):
    layer = frozen_layer()
    layer.load_state_dict(load(folder / "frozen.qat.pt.gz"))
    assert layer.freeze_bn
    assert not layer.bn.training
    assert results_of(layer)[""] == expected(folder, "frozen.qat")[""]


def test_mapping(folder):
    found, expected = tritonq.load_qconfig_mapping(folder / "mapping.json"), mapping()
    assert found.global_rule == expected.global_rule
    assert found.types == expected.types
    # Version 0.1.0 wrote preset x86 as fbgemm, which has the same numbers and, since then, another target.
    assert [(key, qconfig[:2]) for key, qconfig in found.names] == [
        (key, qconfig[:2]) for key, qconfig in expected.names
    ]
