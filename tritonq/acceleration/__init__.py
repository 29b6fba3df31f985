"""Models that other libraries prepared for quantization-aware training, with tritonq's operators inside.

Each way in which a library prepares a model has a module here (`eager`, `graph_modules`, `tensor_quantizers`) with the
same five functions, which :func:`accelerate` and :func:`restore` call: ``is_prepared(model)``, ``package(model)``,
``accelerate(model)``, ``restore(model)`` and ``is_accelerated(model)``. A new library is one more such module in
``_LIBRARIES``, and its versions in ``_VERSIONS``.
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from types import ModuleType

from torch import nn

from tritonq.acceleration import eager, graph_modules, tensor_quantizers
from tritonq.acceleration.report import AccelerationReport, Row
from tritonq.prepare.record.snapshot import copied
from tritonq.switched_quantizer import SwitchedQuantizer

__all__ = ["AccelerationReport", "Row", "accelerate", "report_of", "restore"]

_LOGGER = logging.getLogger("tritonq")
_REPORT = "_tritonq_acceleration"
# The versions of each library that tests compare with: the first, and the first that is not known.
_VERSIONS = {"torch": ((2, 11), (2, 15)), "torchao": ((0, 18), (0, 19)), "modelopt": ((0, 47), (0, 48))}
_LIBRARIES: tuple[ModuleType, ...] = (eager, graph_modules, tensor_quantizers)


def accelerate(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Let tritonq's operators compute a model that another library prepared for quantization-aware training.

    Parameters, buffers, modules, your own hooks and the keys of the state dict stay as they are, so optimizers, weight
    averages and checkpoints go on. Numbers stay the library's, up to the order of float sums and, for Model-Optimizer,
    codes at ties: its scales, its ranges, its switches, in training and in eval mode. Four things differ on purpose: a
    channel whose BatchNorm weight is 0 trains on (the libraries divide by it), values that are not finite are left out
    of running ranges, a step that activation checkpointing recomputes counts once in ranges and BatchNorm statistics
    (in the libraries, twice), and dropouts and BatchNorms keep the p, momentum and eps that torchao's switches between
    training and eval mode overwrite.

    What is not known is left to the library: one line in the log (logger ``tritonq``) tells how many parts tritonq
    computes, a UserWarning names the first 8 others, and :func:`tritonq.acceleration.report_of` has the table.

    Known: torch.ao's eager mode and FX graph mode, torchao's PT2E, and the quantizers of NVIDIA Model-Optimizer.

    Args:
        model: as ``prepare_qat``, ``prepare_qat_fx``, ``prepare_qat_pt2e`` or Model-Optimizer's ``quantize`` returned
            it, in training or eval mode, trained or not.
        inplace: change ``model`` itself; else a deep copy.

    Returns:
        The model. Give it to :func:`restore` before the library converts or exports it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no known library prepared the model, it is accelerated already, or the library's version is not
            known (the message has those that are). The model stays as it was.

    Examples:
        >>> import torch, torch.ao.quantization as ao, tritonq, warnings
        >>> model = torch.nn.Sequential(ao.QuantStub(), torch.nn.Conv2d(3, 4, 3)).train()
        >>> model.qconfig = ao.get_default_qat_qconfig("x86")
        >>> with warnings.catch_warnings(action="ignore"):  # torch.ao is deprecated
        ...     model = tritonq.accelerate(ao.prepare_qat(model))
        >>> print(tritonq.acceleration.report_of(model).left_alone)
        []
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate needs a torch.nn.Module, got {type(model).__name__}")
    if report_of(model) is not None or any(library.is_accelerated(model) for library in _LIBRARIES):
        raise ValueError("this model is accelerated already; tritonq.restore(model) undoes it")
    found = [library for library in _LIBRARIES if library.is_prepared(model)]
    if not found:
        raise ValueError(_what_it_is(model))
    for library in found:
        _check_version(library.package(model))
    if not inplace:
        original, model = model, copied(model)
        graph_modules.keep_modes(original, model)
    reports = [library.accelerate(model) for library in found]
    report = AccelerationReport(
        ", ".join(each.library for each in reports),
        [row for each in reports for row in each.rows],
        [fault for each in reports for fault in each.faults],
    )
    object.__setattr__(model, _REPORT, report)
    _tell(report)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate` in place: give ``model`` the library's own computation back, and return ``model`` itself.

    Weights, ranges and BatchNorm statistics that were learned since stay. The library can then convert, lower and
    export the model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model is not accelerated.

    Examples:
        >>> import torch, torch.ao.quantization as ao, tritonq, warnings
        >>> model = torch.nn.Sequential(ao.QuantStub(), torch.nn.Conv2d(3, 4, 3)).train()
        >>> model.qconfig = ao.get_default_qat_qconfig("x86")
        >>> with warnings.catch_warnings(action="ignore"):  # torch.ao is deprecated
        ...     model = tritonq.accelerate(ao.prepare_qat(model))
        ...     _ = model(torch.ones(1, 3, 8, 8))
        ...     converted = ao.convert(tritonq.restore(model).eval())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore needs a torch.nn.Module, got {type(model).__name__}")
    if report_of(model) is None and not any(library.is_accelerated(model) for library in _LIBRARIES):
        raise ValueError("this model is not accelerated")
    for library in _LIBRARIES:
        library.restore(model)
    model.__dict__.pop(_REPORT, None)
    return model


def report_of(model: nn.Module) -> AccelerationReport | None:
    """Return the report of the :func:`accelerate` that returned ``model``; None if none did.

    :func:`restore` removes the report.

    Examples:
        >>> report_of(nn.Sequential(nn.Linear(2, 2))) is None
        True
    """
    report: AccelerationReport | None = model.__dict__.get(_REPORT)
    return report


def _what_it_is(model: nn.Module) -> str:
    """Return a sentence on a model in which :func:`accelerate` finds nothing to change, for an error's text.

    It tells that quantizers are tritonq's own, if there are any, else the classes of the model's modules.
    """
    own = [name for name, module in model.named_modules() if isinstance(module, SwitchedQuantizer)]
    if own:
        return (
            f"the {len(own)} quantizers of this model, {own[0]!r} first, are tritonq's, and run its operators as they "
            "are; accelerate changes those of torch.ao, torchao and Model-Optimizer"
        )
    classes = sorted({type(module).__name__ for module in model.modules()})
    return (
        "no library that accelerate knows prepared this model for quantization-aware training; its modules are "
        + ", ".join(classes[:8] + ["…"] * (len(classes) > 8))
    )


def _check_version(package: str) -> None:
    """Raise ValueError if the installed version of ``package``, such as "torchao", is not in ``_VERSIONS``.

    Only for these versions do tests compare the library's numbers with tritonq's.
    """
    version = str(importlib.import_module(package).__version__)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    first, end = _VERSIONS[package]
    if not first <= numbers < end:
        known = " to ".join(".".join(map(str, each)) for each in (first, end))
        raise ValueError(f"{package} {version} prepared this model; accelerate knows {package} from {known} (excluded)")


def _tell(report: AccelerationReport) -> None:
    left = report.left_alone
    _LOGGER.info("accelerate: %d of %d parts run by tritonq", len(report.rows) - len(left), len(report.rows))
    if left:
        named = "; ".join(f"{row.name} ({row.kind}): {row.reason}" for row in left[:8])
        more = f"; and {len(left) - 8} more" if len(left) > 8 else ""
        warnings.warn(f"accelerate leaves to {report.library}: {named}{more}", UserWarning, stacklevel=3)
    for fault in report.faults:
        warnings.warn(fault, UserWarning, stacklevel=3)
