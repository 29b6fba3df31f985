"""Models that NVIDIA Model-Optimizer prepared: find its ``TensorQuantizer`` modules, and change their class.

Model-Optimizer puts a ``TensorQuantizer`` before each input and weight. The new class, in `model_optimizer`, is a
subclass that rounds by tritonq's operator. That file imports ``modelopt``, so that this one imports it only for a model
that Model-Optimizer prepared.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from tritonq.acceleration.report import AccelerationReport, Row

_LIBRARY = "modelopt.torch.quantization."


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` contains a ``TensorQuantizer`` of Model-Optimizer, or one of a derived class."""
    return "modelopt" in sys.modules and any(_is_quantizer(module) for module in model.modules())


def package(model: nn.Module) -> str:
    """Return ``"modelopt"``, the Python package that prepared ``model``.

    :func:`tritonq.accelerate` compares the package's installed version with those that it knows. ``model`` is not read:
    call it if :func:`is_prepared` is true.
    """
    return "modelopt"


def accelerate(model: nn.Module) -> AccelerationReport:
    """Change the class of each ``TensorQuantizer`` that tritonq can compute, in place, and return the report.

    Quantizers that are switched off stay as they are, without a row in the report. Those that tritonq can't compute, or
    of a class derived from ``TensorQuantizer``, stay as they are, too, and their row has the reason.
    """
    import modelopt

    from tritonq.acceleration.model_optimizer import AcceleratedTensorQuantizer, why_not

    report = AccelerationReport(f"Model-Optimizer {modelopt.__version__}")
    for name, module in model.named_modules():
        held: Any = module
        if not _is_quantizer(module) or held._disabled:
            continue
        known = type(module) is AcceleratedTensorQuantizer.library_class
        reason = why_not(held) if known else f"a class of its own, {type(module).__name__}"
        if reason is None:
            object.__setattr__(module, "__class__", AcceleratedTensorQuantizer)
        report.rows.append(Row(name, "TensorQuantizer", "" if reason else "rounding", reason or ""))
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate` in place: give every ``TensorQuantizer`` its class of Model-Optimizer back.

    Other modules, and quantizers that were never changed, stay as they are.
    """
    for module in model.modules():
        if type(module).__module__ == "tritonq.acceleration.model_optimizer":
            object.__setattr__(module, "__class__", type(module).library_class)  # type: ignore[attr-defined]


def is_accelerated(model: nn.Module) -> bool:
    """Whether at least one ``TensorQuantizer`` of ``model`` has tritonq's class."""
    return any(type(module).__module__ == "tritonq.acceleration.model_optimizer" for module in model.modules())


def _is_quantizer(module: nn.Module) -> bool:
    return any(
        base.__name__ == "TensorQuantizer" and base.__module__.startswith(_LIBRARY) for base in type(module).__mro__
    )
