"""Record scale, clipped share and changed codes of every quantizer, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.groups import aligned, codes_on
from tritonq.grid import Grid
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.nn.qat import QATLayer
from tritonq.nn.recurrent_forward import WEIGHT_QUANTIZER, is_weight_quantizer
from tritonq.reference.fixed_point import power_of_two


@dataclass(frozen=True)
class QuantizerRecord:
    """One quantizer at one step.

    Attributes:
        step: how many times :meth:`QuantizerHistory.step` had been called, this call included.
        name: qualified name of the quantizer.
        scale: mean of its scales at the end of the step.
        clipped: share of values beyond the ends of its grid, by more than half a scale, from 0 to 1.
        flips: of a weight, the share of codes that changed since this quantizer's record before, from 0 to 1; None for
            activations, and for its first record.

    Examples:
        >>> QuantizerRecord(1, "conv.weight_fake_quant", scale=0.1, clipped=0.0, flips=None).flips is None
        True
    """

    step: int
    name: str
    scale: float
    clipped: float
    flips: float | None


class QuantizerHistory:
    """Records scale, clipped share and flips of every quantizer to integers in training.

    They show what diverges or oscillates.

    Activations are seen by hooks, so that quantizers run by themselves rather than within larger operators: steps give
    the same numbers, and take longer. Each recorded step waits for the device.

    Args:
        model: a prepared model.
        every: record each step whose number is a multiple of this: with 10 the steps 10, 20, 30 and so on.

    Attributes:
        records: a list, in order of steps, of a :class:`QuantizerRecord` per recorded step and quantizer.

    Raises:
        ValueError: a model without fake quantizers to integers, or ``every`` below 1.

    Examples:
        >>> import tritonq
        >>> layer = tritonq.nn.Linear(4, 2, qconfig=tritonq.get_qconfig("lsq_w4a4"))
        >>> history = QuantizerHistory(layer)
        >>> for _ in range(2):
        ...     loss = layer(torch.rand(3, 4)).sum()  # and backward(), and a step of an optimizer
        ...     history.step()
        >>> [(record.step, record.name, record.flips) for record in history.records if "weight" in record.name]
        [(1, 'weight_fake_quant', None), (2, 'weight_fake_quant', 0.0)]
        >>> history.close()
    """

    def __init__(self, model: nn.Module, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.records: list[QuantizerRecord] = []
        self._every, self._step = every, 0
        self._codes: dict[str, Tensor] = {}
        # Of the present step, by name: clipped values and all values.
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._is_open = True
        self._weights = _weights_of(model)
        self._activations: dict[str, FakeQuantizeBase] = {}
        self._hooks: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantizeBase) and name not in self._weights:
                self._activations[name] = module
                self._hooks.append(module.register_forward_hook(self._counter(name)))
        if not self._weights and not self._activations:
            raise ValueError(f"{type(model).__name__} has no fake quantizer of integers: call prepare_qat first")

    def _counter(self, name: str) -> Any:
        def count(quantizer: FakeQuantizeBase, args: tuple[Any, ...], output: Tensor) -> None:
            is_recorded = (self._step + 1) % self._every == 0
            if quantizer.training and is_recorded and quantizer.is_enabled_on_host():
                clipped, values = self._seen.get(name, (torch.zeros((), device=args[0].device), 0))
                x = (args[0] if quantizer.rounds_to_nearest else output).detach()
                self._seen[name] = (clipped + _clipped(x, quantizer.grid()), values + x.numel())

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Count a step; if ``every`` divides its number, append a record of each quantizer that rounds.

        Call it after the optimizer's step: weights are those after it, activations those that ran in training mode
        since the last call. A quantizer that is off or has no scale yet gets no record, nor does one of activations
        that did not run. After :meth:`close` it does nothing.
        """
        if not self._is_open:
            return
        self._step += 1
        if self._step % self._every:
            return
        for name, weight in self._weights.items():
            if not weight.is_rounded():
                continue
            rows = weight.near_codes()
            grid = weight.grid(rows)
            codes, before = codes_on(rows, grid), self._codes.get(name)
            flips = None if before is None else float((codes != before).float().mean())
            self._codes[name] = codes
            self._add(name, grid.scale, float(_clipped(rows, grid)) / max(1, rows.numel()), flips)
        for name, (count, values) in self._seen.items():
            scale = self._activations[name].calculate_qparams().scale
            self._add(name, scale, float(count) / max(1, values), None)
        self._seen.clear()

    def _add(self, name: str, scale: Tensor, clipped: float, flips: float | None) -> None:
        self.records.append(QuantizerRecord(self._step, name, float(scale.mean()), clipped, flips))

    def close(self) -> None:
        """Remove the hooks from the model; nothing is recorded any more."""
        self._is_open = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Weight(NamedTuple):
    """The quantizer of a weight, which is a child of the module that has the weight.

    Attributes:
        owner: the layer, embedding or recurrent layer.
        child: the quantizer's name there, such as ``"weight_fake_quant"``. Another module may take its place.
    """

    owner: nn.Module
    child: str

    @property
    def quantizer(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.child))

    def is_rounded(self) -> bool:
        """Whether the quantizer rounds to integers, being switched on, and has a scale."""
        quantizer = self.quantizer
        if isinstance(self.owner, FixedPointLayer):
            return self.owner.weight_fake_quant.phase == "fixed" and self.owner.weight_fake_quant.is_switched_on_host()
        return isinstance(quantizer, FakeQuantizeBase) and quantizer.is_enabled_on_host()

    def near_codes(self) -> Tensor:
        """Return the values that the quantizer rounds to the nearest code.

        These are the present weight, with a BatchNorm folded in, as the quantizer gets it. If the quantizer takes codes
        by a paper's formula, return its result for that weight in eval mode, which is rounded already.
        """
        owner, quantizer = self.owner, cast(FakeQuantizeBase, self.quantizer)
        if isinstance(owner, QATLayer):
            weight = owner.linear_map.to_rows(owner.weight_to_quantize())
        elif isinstance(owner, FixedPointLayer):
            weight = owner.effective_parameters()[0]
        else:
            weight = cast(Tensor, getattr(owner, self.child.removesuffix(WEIGHT_QUANTIZER)))
        if quantizer.rounds_to_nearest:
            return weight
        training = quantizer.training
        try:
            return cast(Tensor, quantizer.eval()(weight))
        finally:
            quantizer.train(training)

    def grid(self, weight: Tensor) -> Grid:
        """Return the grid to which the quantizer rounds ``weight``; only a fixed-point layer's depends on it."""
        if isinstance(self.owner, FixedPointLayer):
            quantizer = self.owner.weight_fake_quant
            return Grid(power_of_two(-quantizer.choose(weight)), None, quantizer.qtype)
        return cast(FakeQuantizeBase, self.quantizer).grid()


def _weights_of(model: nn.Module) -> dict[str, _Weight]:
    """Return the weights that are quantized to integers, by the paths of their quantizers."""
    found: dict[str, _Weight] = {}
    for path, owner in model.named_modules():
        for name, child in owner.named_children():
            if not isinstance(child, FakeQuantizeBase) or not is_weight_quantizer(name):
                continue
            if child.batch_axis is None or isinstance(owner, FixedPointLayer):
                found[f"{path}.{name}".lstrip(".")] = _Weight(owner, name)
    return found


def _clipped(x: Tensor, grid: Grid) -> Tensor:
    """Return how many values of ``x`` lie more than half a step beyond the ends of the grid; NaN does not count."""
    scale = aligned(grid.scale.detach(), x, grid.granularity)
    zero = torch.zeros_like(scale) if grid.zero_point is None else aligned(grid.zero_point, x, grid.granularity)
    steps = x / scale + zero
    return ((steps < grid.qtype.quant_min - 0.5) | (steps > grid.qtype.quant_max + 0.5)).sum().float()
