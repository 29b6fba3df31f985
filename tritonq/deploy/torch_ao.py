"""Checkpoints of torch.ao's eager QAT, read into a model that `prepare_qat` made without example inputs.

The names are torch.ao's own: this file knows how its versions spelt and shaped them, and imports nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.files import why_unread
from tritonq.deploy.torch_ao_int8 import is_converted, translate
from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn import QATLayer

# Before version 2 a ConvBn held its BatchNorm's state itself.
_BATCH_NORM_BEFORE_2 = {
    "gamma": "bn.weight",
    "beta": "bn.bias",
    "running_mean": "bn.running_mean",
    "running_var": "bn.running_var",
    "num_batches_tracked": "bn.num_batches_tracked",
}
# Before version 3 per-channel observers named their ranges in the plural.
_OBSERVER_BEFORE_3 = {"min_vals": "min_val", "max_vals": "max_val"}
# Buffers of tritonq's observers that torch.ao's lack.
_OURS_ALONE = ("nonfinite_count",)
_CHILD = "activation_post_process"


@dataclass(frozen=True)
class TorchAoReport:
    """The result of :func:`load_torch_ao_state_dict`; ``print`` it.

    Attributes:
        loaded: how many entries of the checkpoint the model took over.
        unmapped: ``(name, reason)`` of each other entry, but not of an ``eps`` that equals the model's.
        missing: names of tensors of the model that the checkpoint does not set, but for ``nonfinite_count``, which
            torch.ao does not have; they are as they were. A checkpoint of QAT lacks none but buffers of quantizers; one
            converted to integers may also lack weights, such as PReLU's.
        notes: sentences about what will differ from torch.ao when training goes on.

    Examples:
        >>> print(TorchAoReport(16, (("fc.qconfig", "no tensor"),), (), ()))
        16 tensors loaded, 1 not mapped, 0 not in the file
          not mapped: fc.qconfig: no tensor
    """

    loaded: int
    unmapped: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded, {len(self.unmapped)} not mapped, {len(self.missing)} not in the file"]
        lines += [f"  not mapped: {name}: {reason}" for name, reason in self.unmapped]
        lines += [f"  not in the file: {name}" for name in self.missing]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_torch_ao_state_dict(model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]) -> TorchAoReport:
    """Load a checkpoint of torch.ao's eager QAT, trained or converted to integers, into the same model of tritonq's.

    It reads both versions of torch.ao's presets, observers that have seen nothing, per-channel observers with the
    earlier name ``min_vals``, ConvBn modules from before they had a child ``bn``, and names with the prefix of
    DataParallel. From a converted model come codes and grids: quantizers stop observing, and BatchNorms, which torch.ao
    folded away, are identities.

    Args:
        model: fused and prepared as it was for torch.ao: ``prepare_qat`` without example inputs. Changed in place.
        state_dict: torch.ao's state dict, a dict that has it under ``"state_dict"`` or ``"model"``, or the path of a
            file of ``torch.save`` with one of these. It is loaded with ``weights_only=True``: code in it is not run.

    Returns:
        How many tensors were loaded, which could not be mapped, with reasons, and which the checkpoint lacks.

    Raises:
        ValueError: ``model`` is not prepared, the checkpoint is of another architecture or qconfig (the message names
            the first tensor that does not fit), or ``state_dict`` has none: a dict without tensors, or a file that
            ``torch.load`` can't read. ``model`` is then unchanged.
        OSError: the file can't be opened.

    Source: the `_load_from_state_dict` methods of torch.ao.quantization.observer, torch.ao.quantization.fake_quantize
        and torch.ao.nn.intrinsic.qat.

    Examples:
        >>> import torch, tritonq
        >>> linear = torch.nn.Sequential(torch.nn.Linear(3, 2)).train()
        >>> linear.qconfig = tritonq.get_default_qat_qconfig()
        >>> qat = tritonq.prepare_qat(linear)
        >>> _ = qat(torch.randn(4, 3))
        >>> print(load_torch_ao_state_dict(qat, qat.state_dict()))    # torch.ao's has the same keys
        16 tensors loaded, 0 not mapped, 0 not in the file
    """
    if not any(isinstance(module, (QATLayer, FakeQuantizeBase)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is not prepared: call prepare_qat first")
    state = _tensors(state_dict)
    if is_converted(state):
        return _load_converted(model, state)
    reader = _Reader(model, state)
    reader.read()
    model.load_state_dict(reader.new, strict=False)
    return TorchAoReport(
        loaded=reader.loaded,
        unmapped=tuple(reader.unmapped.items()),
        missing=tuple(reader.missing),
        notes=tuple(reader.notes()),
    )


def _load_converted(model: nn.Module, state: dict[str, Any]) -> TorchAoReport:
    found = translate(model, state)
    model.load_state_dict(found.state, strict=False)
    missing = [name for name in model.state_dict() if name not in found.state]
    notes = ["the checkpoint is that of a converted model: quantizers keep its grids; enable_observer lets them adapt"]
    if found.folded:
        notes.append(
            f"{len(found.folded)} BatchNorms, that of {found.folded[0]} first, are identities, since the checkpoint "
            "has them folded: freeze them for training (freeze_bn_stats)"
        )
    if found.switched_off:
        notes.append(
            f"the checkpoint has no grid of the results of {', '.join(found.switched_off)}: their quantizers are "
            "switched off; enable_fake_quant, enable_observer and training give them one, or "
            "convert(…, allow_unquantized=True) leaves them in float"
        )
    return TorchAoReport(
        loaded=len(found.used),
        unmapped=tuple((name, "the model has no place for it") for name in state if name not in found.used),
        missing=tuple(name for name in missing if name.rpartition(".")[2] not in _OURS_ALONE),
        notes=tuple(notes),
    )


def _tensors(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    where = "the checkpoint"
    content: Any = source
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        with open(source, "rb") as file:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises half a dozen types for files that are not its own
                raise ValueError(f"{where} can't be read: {why_unread(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{where} holds no state dict")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


class _Reader:
    """Translates a checkpoint of torch.ao for one model; changes neither.

    Attributes:
        new: tensors for the model's state dict, by its names.
        loaded: how many tensors of the checkpoint went into ``new``.
        unmapped: names of the others, with the reason.
        missing: names of quantizers' buffers that the checkpoint does not set.
    """

    def __init__(self, model: nn.Module, state: dict[str, Any]) -> None:
        self._state = state
        self._target = model.state_dict()
        self._quantizers = {
            name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizeBase)
        }
        self.new: dict[str, Tensor] = {}
        self.loaded = 0
        self.unmapped: dict[str, str] = {}
        self.missing: list[str] = []
        self._other_rule: list[str] = []

    def read(self) -> None:
        """Translate the tensors of the checkpoint: fill ``new``, ``loaded``, ``unmapped`` and ``missing``; called once.

        Raises:
            ValueError: a layer's tensor that the model or the checkpoint lacks, a tensor that the model has in
                another shape, or a zero point that is none of the model's codes; the message names it.
        """
        layer_tensors: dict[str, tuple[str, Tensor]] = {}
        quantizer_tensors: dict[str, dict[str, Tensor]] = {}
        for name, value in self._state.items():
            owner = self._quantizer_of(name)
            if not isinstance(value, Tensor):
                self.unmapped[name] = f"it is no tensor but a {type(value).__name__}"
            elif owner is not None:
                tail = name.removeprefix(f"{owner}.")
                head, _, last = tail.rpartition(".")
                tail = f"{head}.{_OBSERVER_BEFORE_3.get(last, last)}".lstrip(".")
                quantizer_tensors.setdefault(owner, {})[tail] = value
            elif f".{_CHILD}." in f".{name}" or ".weight_fake_quant." in f".{name}":
                self.unmapped[name] = "the model has no quantizer there"
            else:
                layer_tensors[self._layer_name(name)] = (name, value)
        self._read_layers(layer_tensors)
        for owner in self._quantizers:
            self._read_quantizer(owner, quantizer_tensors.get(owner, {}))

    def notes(self) -> list[str]:
        """Return, after :meth:`read`, what will differ from torch.ao when training goes on, as sentences.

        There is one at most: quantizers that were trained with version 1 of torch.ao's presets, in a model with another
        version, get their scales from ranges by another ``rule`` of the observer than ``"torch_v1"``.
        """
        if not self._other_rule:
            return []
        return [
            f"{len(self._other_rule)} quantizers, {self._other_rule[0]} first, were trained with the arithmetic of "
            "version 1 and observe with another one from now on; get_default_qat_qconfig(…, version=1) keeps it"
        ]

    def _quantizer_of(self, name: str) -> str | None:
        """Return the name of the outermost quantizer that has the tensor ``name``; None if a layer has it."""
        parts = name.split(".")
        owners = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((owner for owner in owners if owner in self._quantizers), None)

    def _layer_name(self, name: str) -> str:
        head, _, tail = name.rpartition(".")
        modern = f"{head}.{_BATCH_NORM_BEFORE_2.get(tail, tail)}".lstrip(".")
        return modern if name not in self._target and modern in self._target else name

    def _read_layers(self, found: dict[str, tuple[str, Tensor]]) -> None:
        hint = "fuse and prepare the model as it was for torch.ao, without example_inputs"
        for name, (original, value) in found.items():
            if name not in self._target:
                raise ValueError(f"the model has no tensor {original!r}, which the checkpoint holds; {hint}")
            self._check_shape(name, original, value)
            self.new[name] = value
            self.loaded += 1
        for name in self._target:
            if self._quantizer_of(name) is None and name not in found:
                raise ValueError(f"the checkpoint has no tensor {name!r}, which the model needs; {hint}")

    def _check_shape(self, name: str, original: str, value: Tensor) -> None:
        expected = self._target[name].shape
        if value.shape != expected:
            raise ValueError(
                f"{original!r} has shape {tuple(value.shape)} in the checkpoint and {tuple(expected)} in the model"
            )

    def _read_quantizer(self, owner: str, found: dict[str, Tensor]) -> None:
        quantizer = self._quantizers[owner]
        expected = [name for name in self._target if name.startswith(f"{owner}.")]
        zero_point, reason = found.get("zero_point"), None
        if not isinstance(quantizer, FakeQuantize):
            reason = f"a {type(quantizer).__name__} has another state than torch.ao's FakeQuantize"
        elif zero_point is not None and zero_point.is_floating_point():
            reason = "zero points are integers here; this quantizer observes anew"
        if reason is not None:
            self.unmapped.update({f"{owner}.{tail}": reason for tail in found})
            found = {}
        for tail, value in found.items():
            name = f"{owner}.{tail}"
            if tail == f"{_CHILD}.eps":
                self._check_eps(name, quantizer, value)
            elif name not in self._target:
                self.unmapped[name] = "the model's observer has no such state"
            else:
                self.new[name] = self._fitted(name, quantizer, tail, value)
                self.loaded += 1
        for name in expected:
            if name.rpartition(".")[2] in _OURS_ALONE and found:
                self.new[name] = torch.zeros_like(self._target[name])
            elif name not in self.new and name.rpartition(".")[2] not in _OURS_ALONE:
                self.missing.append(name)
        if found:
            self._check_codes(owner, quantizer)
            switch = found.get("fake_quant_enabled")
            observer = getattr(quantizer, _CHILD)
            if switch is not None and switch.dtype == torch.int64 and observer.rule != "torch_v1":
                self._other_rule.append(owner)

    def _check_eps(self, name: str, quantizer: FakeQuantizeBase, value: Tensor) -> None:
        eps = getattr(quantizer, _CHILD).eps
        if not bool((value == torch.tensor(eps)).all()):
            self.unmapped[name] = f"it is {float(value.max()):.6g} there and {eps:.6g} in the model's qconfig"

    def _fitted(self, name: str, quantizer: FakeQuantizeBase, tail: str, value: Tensor) -> Tensor:
        """Return ``value``, the quantizer's tensor ``tail``, in the shape and dtype that the model keeps it in.

        Raises:
            ValueError: its shape does not fit.
        """
        expected = self._target[name]
        value = value.detach().to("cpu", expected.dtype)
        if value.numel() == 0 and tail.endswith(("min_val", "max_val")):
            # A per-channel observer that has seen nothing.
            return torch.full_like(expected, torch.inf if tail.endswith("min_val") else -torch.inf)
        if expected.numel() == 0 and quantizer.qtype.axis is not None:
            return value.reshape(-1)  # the model learns its channel count from the checkpoint
        if value.numel() == 1 or value.numel() == expected.numel():
            return value.reshape(-1).expand(expected.numel()).reshape(expected.shape).clone()
        raise ValueError(
            f"{name!r} has shape {tuple(value.shape)} in the checkpoint and {tuple(expected.shape)} in the model"
        )

    def _check_codes(self, owner: str, quantizer: FakeQuantizeBase) -> None:
        zero_point, low = self.new.get(f"{owner}.zero_point"), self.new.get(f"{owner}.{_CHILD}.min_val")
        if zero_point is None or low is None or not bool((low < torch.inf).any()):
            return
        qtype = quantizer.qtype
        if bool((zero_point < qtype.quant_min).any()) or bool((zero_point > qtype.quant_max).any()):
            raise ValueError(
                f"the zero point {int(zero_point.flatten()[0])} of {owner!r} is none of the model's codes "
                f"{qtype.quant_min}..{qtype.quant_max}: the checkpoint was trained with another qconfig"
            )
