"""The methods of other libraries, each prepared as its documentation says; the same layers have 8 bits as in tritonq's.

Versions that these calls were tried with: torch 2.13, torchao 0.18, nvidia-modelopt 0.47, brevitas 0.13, aimet-torch
2.42.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from tritonq.perf.accuracy.by_hand import StepParts
from tritonq.perf.accuracy.nets import NETS, Parts
from tritonq.perf.accuracy.request import Method, Request


def _by_hand(request: Request) -> nn.Module:
    return _load(NETS[request.net](request.classes, StepParts(request.weights, request.activations)), request)


def _load(model: nn.Module, request: Request) -> nn.Module:
    """Load the float model's weights into ``model`` and return it.

    What the library adds stays as the library sets it.
    """
    unexpected = model.load_state_dict(request.model.state_dict(), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"weights that the model does not have: {', '.join(unexpected)}")
    return model


def _first_and_last(model: nn.Module) -> tuple[str, str]:
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return names[0], names[-1]


def _torch_ao(request: Request) -> nn.Module:
    """Return the model prepared in torch.ao's FX mode.

    Activations are affine, weights symmetric per channel; both have moving ranges.
    """
    from torch.ao.quantization import QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    first, last = _first_and_last(request.model)
    # A layer's qconfig makes the quantizer behind it: in front of the first and the last layer 8 bits.
    mapping = (
        QConfigMapping()
        .set_global(_torch_qconfig(request.weights, request.activations))
        .set_module_name(first, _torch_qconfig(8, request.activations))
        .set_module_name(last, _torch_qconfig(8, 8))
    )
    prepared = prepare_qat_fx(request.model.train(), mapping, (request.images,))
    for node in prepared.graph.nodes:
        if node.op == "placeholder":
            for user in node.users:
                setattr(prepared, str(user.target), _torch_qconfig(8, 8).activation())
    return cast(nn.Module, prepared)


def _torch_qconfig(weights: int, activations: int) -> Any:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize as Fused
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver, QConfig

    half = 2 ** (weights - 1)
    return QConfig(
        activation=Fused.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=2**activations - 1, dtype=torch.quint8
        ),
        weight=Fused.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-half,
            quant_max=half - 1,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    )


def _pt2e(request: Request) -> nn.Module:
    """Return the model of torchao's PT2E: exported, annotated by the quantizer for x86, and prepared.

    Convolution and BatchNorm are folded in every step.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    first, last = _first_and_last(request.model)
    quantizer = x86.X86InductorQuantizer().set_global(_pt2e_config(request.weights, request.activations))
    quantizer.set_module_name_qconfig(first, _pt2e_config(8, request.activations))
    quantizer.set_module_name_qconfig(last, _pt2e_config(8, 8))
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(request.model.train(), (request.images,), dynamic_shapes=shapes, strict=True)
    prepared = prepare_qat_pt2e(cast(Any, exported).module(), quantizer)
    return cast(nn.Module, allow_exported_model_train_eval(prepared))


def _pt2e_config(weights: int, activations: int) -> Any:
    """Return the default configuration of the quantizer for x86, with the codes of so many bits."""
    from dataclasses import replace

    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    default = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    half = 2 ** (weights - 1)
    activation = replace(default.input_activation, quant_min=0, quant_max=2**activations - 1)
    weight = replace(default.weight, quant_min=-half, quant_max=half - 1)
    return replace(default, input_activation=activation, output_activation=activation, weight=weight)


def _modelopt(request: Request) -> nn.Module:
    """Return the model of Model-Optimizer: quantizers at the inputs of layers, whose ranges a batch fixes."""
    import modelopt.torch.quantization as mtq

    first, last = _first_and_last(request.model)

    def input_to(bits: int, *, unsigned: bool) -> dict[str, Any]:
        return {"num_bits": bits, "axis": None, "unsigned": unsigned}

    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": request.weights, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": input_to(request.activations, unsigned=True)},
        {"quantizer_name": "*BatchNorm*", "enable": False},
        {"quantizer_name": f"{first}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": f"{first}.input_quantizer", "cfg": input_to(8, unsigned=False)},
        {"quantizer_name": f"{last}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": f"{last}.input_quantizer", "cfg": input_to(8, unsigned=True)},
        *({"quantizer_name": "*", "parent_class": kind, "enable": False} for kind in ("nn.BatchNorm2d",)),
    ]
    config = {"quant_cfg": rules, "algorithm": "max"}
    return cast(nn.Module, mtq.quantize(request.model, config, lambda model: model(request.images)).train())


class _BrevitasParts(Parts):
    """Layers as Brevitas' users write them: quantized weights, and quantizers after ReLUs."""

    def __init__(self, weights: int, activations: int, *, by_error: bool) -> None:
        from brevitas.quant import (
            Int8ActPerTensorFloat,
            Int8WeightPerChannelFloat,
            Int8WeightPerChannelFloatMSE,
            Uint8ActPerTensorFloat,
            Uint8ActPerTensorFloatMSE,
        )

        self.weights, self.activations = weights, activations
        self.weight = Int8WeightPerChannelFloatMSE if by_error else Int8WeightPerChannelFloat
        self.unsigned = Uint8ActPerTensorFloatMSE if by_error else Uint8ActPerTensorFloat
        self.signed = Int8ActPerTensorFloat

    def conv(self, inputs: int, outputs: int, size: int, stride: int, groups: int, *, is_first: bool) -> nn.Module:
        """Return Brevitas' convolution with a quantized weight; the first one has 8 bits and quantizes the images."""
        import brevitas.nn as qnn

        return cast(
            nn.Module,
            qnn.QuantConv2d(
                inputs,
                outputs,
                size,
                stride,
                size // 2,
                groups=groups,
                bias=False,
                weight_quant=self.weight,
                weight_bit_width=8 if is_first else self.weights,
                input_quant=self.signed if is_first else None,
                input_collect_stats_steps=_COLLECT_STEPS,
            ),
        )

    def activation(self) -> nn.Module:
        """Return Brevitas' ReLU with a quantized result."""
        import brevitas.nn as qnn

        quantized = qnn.QuantReLU(
            act_quant=self.unsigned, bit_width=self.activations, collect_stats_steps=_COLLECT_STEPS
        )
        return cast(nn.Module, quantized)

    def head(self, inputs: int, classes: int) -> nn.Module:
        """Return Brevitas' linear layer, whose weight and input have 8 bits."""
        import brevitas.nn as qnn

        return cast(
            nn.Module,
            qnn.QuantLinear(
                inputs,
                classes,
                weight_quant=self.weight,
                weight_bit_width=8,
                input_quant=self.unsigned,
                input_collect_stats_steps=_COLLECT_STEPS,
            ),
        )


# Of some 200; Brevitas' own default of 300 would never let scales be trained here.
_COLLECT_STEPS = 30


def _brevitas(request: Request) -> nn.Module:
    return _load(
        NETS[request.net](request.classes, _BrevitasParts(request.weights, request.activations, by_error=False)),
        request,
    )


def _brevitas_by_error(request: Request) -> nn.Module:
    return _load(
        NETS[request.net](request.classes, _BrevitasParts(request.weights, request.activations, by_error=True)), request
    )


def _aimet(request: Request) -> nn.Module:
    """Return the model of AIMET: every layer is wrapped; a batch gives the first ranges, which are trained."""
    from tritonq.perf.cases.vision_models import import_torchvision

    import_torchvision()  # aimet imports it, without what a CPU build of torch lacks
    from aimet_torch import QuantizationSimModel

    simulation = QuantizationSimModel(request.model.eval(), request.images)
    first, last = _first_and_last(request.model)
    layers = dict(simulation.model.named_modules())
    for name, layer in layers.items():
        for quantizers, bits in (
            (getattr(layer, "param_quantizers", {}).values(), 8 if name in (first, last) else request.weights),
            (getattr(layer, "output_quantizers", ()), request.activations),
        ):
            for quantizer in quantizers:
                if quantizer is not None:
                    quantizer.bitwidth = bits
    with torch.no_grad():
        simulation.compute_encodings(lambda model, _: model(request.images), None)
    return cast(nn.Module, simulation.model.train())


PEERS: dict[str, Method] = {
    "LSQ by hand": Method(
        "by hand", _by_hand, at_all_widths=True, distributions=("torch",), differs="BatchNorm is not folded"
    ),
    "torch.ao": Method("torch.ao", _torch_ao, distributions=("torch",), differs="moving ranges"),
    "PT2E": Method(
        "torchao PT2E",
        _pt2e,
        at_all_widths=True,
        distributions=("torchao",),
        modules=("torchao",),
        differs="moving ranges",
    ),
    "Model-Optimizer": Method(
        "Model-Optimizer",
        _modelopt,
        distributions=("nvidia-modelopt",),
        modules=("modelopt",),
        differs="BatchNorm in float, ranges fixed by one batch",
    ),
    "Brevitas": Method(
        "Brevitas",
        _brevitas,
        at_all_widths=True,
        distributions=("brevitas",),
        modules=("brevitas",),
        differs="BatchNorm in float; scales of activations are trained, those of weights follow the largest",
    ),
    "Brevitas MSE": Method(
        "Brevitas",
        _brevitas_by_error,
        at_all_widths=True,
        distributions=("brevitas",),
        modules=("brevitas",),
        differs="as Brevitas; scales begin at the least squared error, and weights' are trained too",
    ),
    "AIMET": Method(
        "AIMET",
        _aimet,
        distributions=("aimet-torch",),
        modules=("aimet_torch",),
        differs="BatchNorm in float, ranges trained",
    ),
}
