"""Filters of one sign under torch.ao's version 1: told when a model is prepared and when it is converted."""

import warnings

import pytest
import torch
from torch import nn

import tritonq

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ONE_SIDED = r"zero points differ between channels in {}: .*get_qconfig\("


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()
    )
    with torch.no_grad():
        model[3].weight[:2].abs_()
    return model


def test_one_sided_filters_are_told_with_a_way_out():
    qconfig = tritonq.get_default_qat_qconfig("x86")
    with pytest.warns(UserWarning, match=ONE_SIDED.format("3")):
        model = tritonq.prepare_qat(net(), qconfig=qconfig, example_inputs=X).train()
    model(X)
    with pytest.warns(UserWarning, match=ONE_SIDED.format("3")):
        tritonq.convert(model)


@pytest.mark.parametrize("qconfig", [tritonq.get_default_qat_qconfig("x86", 0), tritonq.get_qconfig("onnxruntime")])
def test_other_presets_have_none(qconfig):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tritonq.prepare_qat(net(), qconfig=qconfig, example_inputs=X).train()
        model(X)
        assert tritonq.convert(model)[3].weight_zero_point is None


def test_two_sided_filters_and_a_caller_who_knows_are_left_alone():
    qconfig, model = tritonq.get_default_qat_qconfig("x86"), net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=X, warn=False)
        with torch.no_grad():
            model[3].weight[:2, :, 0].neg_()
        model = tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=X).train()
        model(X)
        tritonq.convert(model)
