"""Checks that an own observer or fake quantizer keeps the contract that preparation, training and deployment rest on.

The contract, for a fake quantizer (a module that a :class:`tritonq.QConfig` makes):

- ``qtype``, a :class:`tritonq.QuantizedType`; ``calculate_qparams()``, scale and zero point as deployment uses them;
  ``fake_quant_enabled`` and ``observer_enabled``, uint8 buffers of one element, with ``enable_fake_quant``,
  ``disable_fake_quant``, ``enable_observer`` and ``disable_observer``. :class:`tritonq.FakeQuantize` gives all of them.
- ``forward(x)`` observes in training mode alone and while ``observer_enabled`` is 1; it rounds to exactly the values
  ``(code - zero_point) * scale`` of the grid that ``calculate_qparams`` says, and passes ``x`` while it is off.
- Its state is in buffers and parameters, finite once it has observed, so that copies, state dicts and averages hold.

An own observer (a :class:`tritonq.observers.ObserverBase`) gives ``forward``, ``calculate_qparams`` and
``has_observed``; put into ``tritonq.FakeQuantize.with_args(observer=…)`` it is checked the same way.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy import convert, export_onnx, verify
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.groups import aligned
from tritonq.prepare import prepare_qat
from tritonq.qconfig import QConfig, get_qconfig

__all__ = ["QuantizerCheckError", "check_quantizer"]

_BATCHES = 3


class QuantizerCheckError(AssertionError):
    """A quantizer breaks its contract.

    Args:
        name: of the class or function that makes the quantizer.
        failed: what went wrong, by name of the check, such as ``{"interface": "it has no qtype"}``.

    Attributes:
        failed: the argument of this name.

    Examples:
        >>> import torch, tritonq
        >>> try:
        ...     tritonq.testing.check_quantizer(torch.nn.Identity)
        ... except tritonq.testing.QuantizerCheckError as error:
        ...     print(list(error.failed))
        ['interface']
    """

    def __init__(self, name: str, failed: dict[str, str]) -> None:
        self.failed = failed
        lines = [f"  {check}: {reason}" for check, reason in failed.items()]
        super().__init__("\n".join([f"{name} breaks its contract:", *lines]))


@dataclass
class _Subject:
    """The quantizer or observer that is checked.

    Attributes:
        make: makes a new one.
        weight: whether it is for weights.
    """

    make: Callable[[], Any]
    weight: bool

    def channels(self, wanted: int) -> int:
        """Return the number of channels to try it with: the size of a group if its type has groups, else ``wanted``."""
        return self.make().qtype.group or wanted

    def batch(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn((4, self.channels(3), 5, 5), generator=generator) * (1 + index)

    def trained(self) -> Any:
        quantizer = self.make()
        if self.weight and isinstance(quantizer, FakeQuantizeBase):
            quantizer.batch_axis = None
        quantizer.train()
        for index in range(_BATCHES):
            quantizer(self.batch(index))
        return quantizer

    def qconfig(self) -> QConfig:
        plain = get_qconfig("tensorrt")
        return QConfig(plain.activation, self.make) if self.weight else QConfig(self.make, plain.weight)


def check_quantizer(
    make: Callable[[], nn.Module], *, weight: bool = False, compiled: bool = True, exported: bool = True
) -> list[str]:
    """Check that a fake quantizer can be prepared, trained, averaged, compiled, converted, exported and verified.

    It has integer codes, a scale and a zero point: :class:`tritonq.FloatFakeQuantize`, whose codes are floats, has not;
    fixed-point quantizers work on whole networks alone, and a PassiveObserver has to be made with its scale set.

    Args:
        make: a class, or a factory (``Class.with_args(…)``), that makes the quantizer without further arguments.
        weight: check it as the quantizer of weights, else of activations.
        compiled: whether to compile a training step too; takes some seconds and empties torch.compile's caches.
        exported: whether to write an ONNX file too, and to compare it with the trained model.

    Returns:
        The names of the checks, in order. ``"onnx"`` is left out where onnx, onnxruntime or onnxscript is missing.

    Raises:
        QuantizerCheckError: a check fails. If ``"interface"`` does, the others are not run.

    Examples:
        >>> import tritonq
        >>> tritonq.testing.check_quantizer(tritonq.FakeQuantize, compiled=False, exported=False)[:3]
        ['interface', 'values', 'switches']
    """
    subject = _Subject(make, weight)
    checks: dict[str, Callable[[_Subject], None]] = dict(_CHECKS)
    if compiled:
        checks["compile"] = _compile
    if exported and all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        checks["onnx"] = _onnx
    failed: dict[str, str] = {}
    for name, check in checks.items():
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                check(subject)
        except Exception as error:  # whatever an own class raises is what its author wants to read
            failed[name] = f"{type(error).__name__}: {error}" if not isinstance(error, _BrokenError) else str(error)
            if name == "interface":
                break
    if failed:
        raise QuantizerCheckError(getattr(make, "__name__", repr(make)), failed)
    return list(checks)


class _BrokenError(Exception):
    """Raised by one check when it fails; the message says how."""


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _BrokenError(reason)


def _interface(subject: _Subject) -> None:
    quantizer = subject.make()
    _require(isinstance(quantizer, nn.Module), f"it is no torch.nn.Module but a {type(quantizer).__name__}")
    names = ["qtype", "calculate_qparams", "fake_quant_enabled", "observer_enabled"]
    names += ["enable_fake_quant", "disable_fake_quant", "enable_observer", "disable_observer"]
    missing = [name for name in names if not hasattr(quantizer, name)]
    _require(not missing, f"it has no {', '.join(missing)}")
    _require(subject.make() is not quantizer, "the factory returned one object twice")


def _values(subject: _Subject) -> None:
    quantizer = subject.trained().eval()
    x = subject.batch(9)
    y = quantizer(x)
    _require(y.shape == x.shape and y.dtype == x.dtype, f"it made {y.dtype} {tuple(y.shape)} of {tuple(x.shape)}")
    granularity = quantizer.qtype.granularity
    scale, zero_point = (aligned(each.float(), x, granularity) for each in quantizer.calculate_qparams())
    codes = (y / scale).round() + zero_point
    low, high = quantizer.qtype.quant_min, quantizer.qtype.quant_max
    _require(bool((codes >= low).all() and (codes <= high).all()), f"its results have codes beyond {low} and {high}")
    _require(
        torch.equal((codes - zero_point) * scale, y),
        "its results are not (code - zero_point) * scale of calculate_qparams",
    )
    _require(torch.equal(quantizer(y), y), "rounding its own results changes them")


def _switches(subject: _Subject) -> None:
    quantizer = subject.trained()
    quantizer.disable_fake_quant()
    quantizer.disable_observer()
    x = subject.batch(4)
    _require(torch.equal(quantizer(x), x), "switched off, it does not pass its input")
    quantizer.enable_fake_quant()
    before = _state(quantizer)
    quantizer(x * 100)
    _require(_same(before, quantizer), "with its observer off, a batch changes its state")
    quantizer.enable_observer()
    quantizer.eval()
    quantizer(x * 100)
    _require(_same(before, quantizer), "in eval mode a batch changes its state")


def _state(quantizer: Any) -> dict[str, Tensor]:
    switches = ("fake_quant_enabled", "observer_enabled")
    return {name: value.clone() for name, value in quantizer.state_dict().items() if not name.endswith(switches)}


def _same(before: dict[str, Tensor], quantizer: Any) -> bool:
    now = _state(quantizer)
    return list(now) == list(before) and all(torch.equal(now[name], value) for name, value in before.items())


def _gradient(subject: _Subject) -> None:
    quantizer = subject.trained()
    quantizer.disable_observer()
    x = subject.batch(5).requires_grad_()
    quantizer(x).sum().backward()
    _require(x.grad is not None and bool(torch.isfinite(x.grad).all()), "its input's gradient is not finite")
    _require(x.grad is not None and bool((x.grad != 0).any()), "its input gets no gradient anywhere")
    for name, parameter in quantizer.named_parameters():
        if parameter.requires_grad:
            finite = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
            _require(finite, f"its parameter {name} gets no finite gradient")


def _copies(subject: _Subject) -> None:
    quantizer = subject.trained().eval()
    x = subject.batch(6)
    expected = quantizer(x)
    _require(torch.equal(copy.deepcopy(quantizer)(x), expected), "a deep copy gives other results")
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    fresh = subject.make()
    fresh.load_state_dict(torch.load(file))
    _require(torch.equal(fresh.eval()(x), expected), "a new one that loads its state dict gives other results")


def _averages(subject: _Subject) -> None:
    quantizer = subject.trained()
    infinite = [n for n, v in quantizer.state_dict().items() if v.is_floating_point() and not torch.isfinite(v).all()]
    _require(not infinite, f"its state is not finite after it has observed: {', '.join(infinite)}")
    other = subject.trained()
    other(subject.batch(7))
    averaged = copy.deepcopy(quantizer)
    with torch.no_grad():
        for name, value in averaged.state_dict().items():
            if value.is_floating_point():
                value.copy_((value + other.state_dict()[name]) / 2)
    _require(
        bool(torch.isfinite(averaged.eval()(subject.batch(8))).all()), "the average of two gives results not finite"
    )


def _precision(subject: _Subject) -> None:
    quantizer = subject.trained().eval()
    before = [value.clone() for value in quantizer.calculate_qparams()]
    quantizer.bfloat16()
    now = quantizer.calculate_qparams()
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, now, strict=True))
    _require(same, "bfloat16() on it changes scale or zero point")


def _net(subject: _Subject) -> nn.Module:
    torch.manual_seed(0)
    inputs, width = subject.channels(3), subject.channels(4)
    first, second = nn.Conv2d(inputs, width, 3), nn.Conv2d(width, width, 3)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.Flatten(), nn.Linear(width, 2))


def _trained_model(subject: _Subject) -> nn.Module:
    model = prepare_qat(_net(subject).train(), qconfig=subject.qconfig(), example_inputs=subject.batch(0)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for index in range(2):
        optimizer.zero_grad()
        model(subject.batch(index)).square().mean().backward()
        optimizer.step()
    return model


def _prepare(subject: _Subject) -> None:
    model = _trained_model(subject)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    _require(finite, "parameters are not finite after two training steps of a small model")


def _conversion(subject: _Subject) -> None:
    model = _trained_model(subject).eval()
    report = verify(model, convert(model), subject.batch(3))
    _require(report.agrees(), f"the converted model differs from the trained one:\n{report}")


def _compile(subject: _Subject) -> None:
    model = _trained_model(subject)
    torch._dynamo.reset()
    step: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = subject.batch(2)
    results = []
    for run in (step, model):
        torch.manual_seed(0)  # a quantizer may draw random numbers in training
        results.append(run(x))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def _onnx(subject: _Subject) -> None:
    model = _trained_model(subject).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        export_onnx(model, path, example_inputs=subject.batch(3))
        report = verify(model, path, subject.batch(3))
    _require(report.agrees(), f"the ONNX file differs from the trained model:\n{report}")


_CHECKS: dict[str, Callable[[_Subject], None]] = {
    "interface": _interface,
    "values": _values,
    "switches": _switches,
    "gradient": _gradient,
    "copies": _copies,
    "averages": _averages,
    "precision": _precision,
    "prepare": _prepare,
    "convert": _conversion,
}
