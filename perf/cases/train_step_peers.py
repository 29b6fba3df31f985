"""Training steps of other libraries, each prepared as its own documentation says, and what each leaves out.

A maker receives a float model and example images, and returns the model that is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.perf.cases.vision_models import has_torchvision, import_torchvision

Maker = Callable[[nn.Module, Tensor], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A library that quantizes a whole model for training.

    Attributes:
        distribution: name in the package index.
        module: top-level module whose absence means "not installed".
        make: prepares a model.
        leaves_out: which parts of tritonq's default preset its model doesn't do, or does otherwise; one line.
        devices: where it runs.
    """

    distribution: str
    module: str
    make: Maker
    leaves_out: str
    devices: tuple[str, ...] = ("cpu", "cuda")


def peer_model(peer: Peer, model: nn.Module, images: Tensor) -> nn.Module:
    """Return ``model`` as ``peer`` trains it.

    torchvision, which some libraries import, is imported before in a way that can't fail.
    """
    if has_torchvision():
        import_torchvision()
    return peer.make(model, images)


def _pt2e(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model of torchao's PT2E: exported, annotated by the quantizer for x86, and prepared.

    Convolution and BatchNorm are folded in every step.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    exported: Any = torch.export.export(model, (images,), strict=True).module()
    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_qat=True))
    # It is in training mode as it was exported; torchao's own switch would give every dropout p 0.5.
    prepared: nn.Module = prepare_qat_pt2e(exported, quantizer)
    return prepared


def accelerate(model: nn.Module) -> nn.Module:
    """Return a model that another library prepared, with tritonq's operators inside."""
    import tritonq

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # which name the library's own faults
        return tritonq.accelerate(model, inplace=True)


def _pt2e_accelerated(model: nn.Module, images: Tensor) -> nn.Module:
    return accelerate(_pt2e(model, images))


def _modelopt_accelerated(model: nn.Module, images: Tensor) -> nn.Module:
    return accelerate(_modelopt(model, images))


def _modelopt(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model of Model-Optimizer: quantizers are inserted, and one batch fixes their ranges."""
    import modelopt.torch.quantization as mtq

    def calibrate(quantized: nn.Module) -> None:
        # By the batch's statistics, as in training: the running ones of a new model say nothing.
        quantized.train()
        quantized(images)

    prepared: nn.Module = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, calibrate)
    return prepared.train()


def _brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model of Brevitas: traced, with layers replaced by quantized ones."""
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    # Merged, a BatchNorm would no longer normalize by the batch, and another model would be trained.
    traced = preprocess_for_quantize(model, merge_bn=False, equalize_merge_bias=False)
    prepared: nn.Module = quantize(traced)
    return prepared.train()


def _aimet(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model of AIMET: every layer is wrapped, and one batch gives the ranges."""
    from aimet_torch import QuantizationSimModel

    simulation = QuantizationSimModel(model.eval(), images)

    def calibrate(quantized: nn.Module, *_: object) -> None:
        quantized.train()
        with torch.no_grad():
            quantized(images)

    simulation.compute_encodings(calibrate)
    prepared: nn.Module = simulation.model
    return prepared.train()


PEERS = {
    "torchao PT2E": Peer(
        "torchao", "torchao", _pt2e, "affine uint8 activations; shapes are fixed by the exported example"
    ),
    "Model-Optimizer": Peer(
        "nvidia-modelopt",
        "modelopt",
        _modelopt,
        "BatchNorm stays a layer of its own, in float; ranges are fixed before training; additions are in float",
    ),
    "Brevitas": Peer(
        "brevitas",
        "brevitas",
        _brevitas,
        "BatchNorm stays a layer of its own, in float, between a convolution's output quantizer and the next",
    ),
    "AIMET": Peer(
        "aimet-torch",
        "aimet_torch",
        _aimet,
        "BatchNorm stays a layer of its own; ranges are fixed before training, and learned",
    ),
}
# Peers' models with tritonq's operators inside.
ACCELERATED_PEERS = {
    "torchao PT2E, accelerated": Peer("torchao", "torchao", _pt2e_accelerated, PEERS["torchao PT2E"].leaves_out),
    "Model-Optimizer, accelerated": Peer(
        "nvidia-modelopt", "modelopt", _modelopt_accelerated, PEERS["Model-Optimizer"].leaves_out
    ),
}
