"""Tools before and after training: each alone as post-training quantization, some also before training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import tritonq
from tritonq.perf.accuracy.methods import LEARNED_STEP, RANGES, MakeQConfig, prepared
from tritonq.perf.accuracy.request import FurtherLoss, Method, Request
from tritonq.qconfig import learned_step_qconfig

Tool = Callable[[nn.Module, list[Tensor]], object]
_ROUNDING_STEPS = 300


def _calibrated(qconfig: MakeQConfig, *tools: Tool, after: bool = True) -> Callable[[Request], nn.Module]:
    """Return a function that prepares the model of a request, calibrates it, and applies ``tools`` to it.

    The tools run after calibration if ``after`` is True, else before it.
    """

    def make(request: Request) -> nn.Module:
        model = prepared(qconfig)(request)
        batches = list(torch.split(request.calibration, len(request.images)))
        for tool in () if after else tools:
            tool(model, batches)
        tritonq.calibrate(model, batches)
        for tool in tools if after else ():
            tool(model, batches)
        return model

    return make


def _equalize(model: nn.Module, batches: list[Tensor]) -> None:
    tritonq.equalize(model, batches)


def _correct_bias(model: nn.Module, batches: list[Tensor]) -> None:
    tritonq.correct_bias(model, batches)


def _adaptive_round(model: nn.Module, batches: list[Tensor]) -> None:
    tritonq.adaptive_round(model, batches, steps=_ROUNDING_STEPS)


def _reestimate(model: nn.Module, batches: list[Tensor]) -> None:
    tritonq.reestimate_batch_norm(model, batches)


def _uniform(request: Request) -> nn.Module:
    """Return the model of a request with all weights at one width, also those of the first and last layer."""
    mapping = tritonq.QConfigMapping().set_global(learned_step_qconfig(request.weights, request.activations))
    return _with_mapping(request, mapping.set_input(tritonq.get_qconfig()))


def _by_budget(request: Request) -> nn.Module:
    """Return the model of a request with widths chosen by sensitivity, in no more bytes than :func:`_uniform` takes."""
    layers = [layer for layer in request.model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    budget = sum(layer.weight.numel() for layer in layers) * request.weights / 8
    images = request.calibration[: 2 * len(request.images)]
    mapping = tritonq.allocate_bits(
        copy.deepcopy(request.model).eval(), images, budget, activation_bits=request.activations
    )
    return _with_mapping(request, mapping)


def _with_mapping(request: Request, mapping: tritonq.QConfigMapping) -> nn.Module:
    model = tritonq.prepare_qat(request.model.train(), qconfig=mapping, example_inputs=request.images)
    return tritonq.calibrate(model, list(torch.split(request.calibration, len(request.images))))


def _distilled(student: nn.Module, teacher: nn.Module) -> FurtherLoss:
    return tritonq.Distillation(student, teacher).loss


def _tool(make: Callable[[Request], nn.Module], differs: str, *, trained: bool) -> Method:
    return Method("tritonq", make, distributions=("tritonq",), differs=differs, is_trained=trained)


TOOLS: dict[str, Method] = {
    "calibrated": _tool(_calibrated(RANGES), "ranges of 1,000 images, no training", trained=False),
    "equalized": _tool(_calibrated(RANGES, _equalize, after=False), "equalize, then calibrate", trained=False),
    "bias corrected": _tool(_calibrated(RANGES, _correct_bias), "calibrate, then correct_bias", trained=False),
    "reestimated": _tool(_calibrated(RANGES, _reestimate), "calibrate, then reestimate_batch_norm", trained=False),
    "rounded": _tool(_calibrated(RANGES, _adaptive_round), "calibrate, then adaptive_round", trained=False),
    "uniform width": _tool(_uniform, "LSQ's scales, every weight at one width, no training", trained=False),
    "bits by budget": _tool(_by_budget, "allocate_bits with as many bytes, no training", trained=False),
    "LSQ, equalized": _tool(_calibrated(LEARNED_STEP, _equalize, after=False), "starts after equalize", trained=True),
    "LSQ, rounded": _tool(_calibrated(LEARNED_STEP, _adaptive_round), "starts after adaptive_round", trained=True),
    "LSQ, distilled": Method(
        "tritonq",
        prepared(LEARNED_STEP),
        distributions=("tritonq",),
        differs="the float model's outputs as further targets",
        further_loss=_distilled,
    ),
}
