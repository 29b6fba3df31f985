"""The engines (*targets*) that presets are made for: what each can compute, and which form of ONNX file it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

OnnxForm = Literal["onnxruntime", "tensorrt", "qdq"]
"""The forms that `export_onnx` writes."""


@dataclass(frozen=True)
class Target:
    """An engine, and what training must know of it.

    Attributes:
        name: the engine's name in a preset, such as ``"tensorrt"``.
        onnx: form of its ONNX files: ``"onnxruntime"``, ``"tensorrt"`` or ``"qdq"``.
        fuses_functions: True: it computes a layer and the function behind it (SiLU, Hardswish and the like) as one
            operation in float, so that the layer's own result is not rounded. False: the function reads codes, so that
            values are rounded before and after it.
        fuses_joins: True: it computes an addition in the convolution before it, and a concatenation without a copy. So
            one summand behind a convolution, and parts that only the concatenation reads, are not rounded before, but
            with the result.
        reads_one_grid: True: a layer that is called with inputs of several grids gets a quantizer of its own for them,
            so that its int32 bias has one unit.
        convolves_codes: True: convolutions whose result stays in float are written by ConvInteger in its ONNX files,
            whose sums are exact. False: it computes on codes between DequantizeLinear and what follows by itself.
        scales_transposed_channels: whether weights of transposed convolutions may have a scale per out channel.
    """

    name: str
    onnx: OnnxForm
    fuses_functions: bool = False
    fuses_joins: bool = False
    scales_transposed_channels: bool = True
    reads_one_grid: bool = False
    convolves_codes: bool = False


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", "onnxruntime", reads_one_grid=True, convolves_codes=True),
        Target("tensorrt", "tensorrt", fuses_functions=True, fuses_joins=True, scales_transposed_channels=False),
        Target("openvino", "onnxruntime", reads_one_grid=True),
        Target("qnn", "qdq"),
        # ExecuTorch's delegate lowers programs of `export_program(form="pt2e")`; the ONNX file has the same grids.
        Target("xnnpack", "qdq"),
        # torch.ao's engines run on CPUs; ONNX Runtime runs their models with the same numbers.
        *(Target(name, "onnxruntime", convolves_codes=True) for name in ("fbgemm", "x86", "qnnpack", "onednn")),
    )
}
DEFAULT_TARGET = "onnxruntime"
# Forms of ONNX files by their own names, and by those of the targets that read them.
ONNX_FORMS: dict[str, OnnxForm] = {
    **{form: form for form in get_args(OnnxForm)},
    **{name: target.onnx for name, target in TARGETS.items()},
}


def find_target(name: str | None) -> Target:
    """Return the target with this name; None: the default one, ``"onnxruntime"``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name is None:
        name = DEFAULT_TARGET
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def onnx_form_named(name: str) -> OnnxForm:
    """Return the form of ONNX file for the name of a form or of a target.

    A form ("onnxruntime", "tensorrt", "qdq") is returned itself, the target "openvino" gives "onnxruntime".

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in ONNX_FORMS:
        raise ValueError(f"unknown target {name!r}; known: {', '.join(ONNX_FORMS)}")
    return ONNX_FORMS[name]


def onnx_form_of(modules: Iterable[nn.Module]) -> OnnxForm:
    """Return the form of ONNX file that the layers among ``modules`` were prepared for.

    A quantization-aware layer holds its preset as ``qconfig``, a converted layer the name of the target as ``target``.
    If no layer names a target, the form is that of the default target.

    Raises:
        ValueError: layers that were prepared for targets that read different forms.
    """
    names = {name for name in map(_target_name, modules) if name is not None}
    forms: set[OnnxForm] = {find_target(name).onnx for name in names}
    if len(forms) > 1:
        raise ValueError(f"layers were prepared for different targets ({', '.join(sorted(names))}): pass target=")
    return forms.pop() if forms else find_target(None).onnx


def convolves_codes(target: str | None, modules: Iterable[nn.Module]) -> bool:
    """Whether convolutions whose result stays in float may be written as ConvInteger in an ONNX file.

    They may if :attr:`Target.convolves_codes` is True for each target that counts.

    Args:
        target: name of the only target that counts. With None, or a form that is no target's name (``"qdq"``), the
            targets that the layers were prepared for count; if no layer has one, the default target.
        modules: all modules of the prepared or converted model.
    """
    names = {target} if target in TARGETS else {name for name in map(_target_name, modules) if name is not None}
    return all(find_target(name).convolves_codes for name in names or {DEFAULT_TARGET})


def _target_name(module: Any) -> str | None:
    qconfig = getattr(module, "qconfig", None)
    name = getattr(module, "target", None) if qconfig is None else getattr(qconfig, "target", None)
    return name if isinstance(name, str) and name in TARGETS else None
