"""Record scale, clipped share and changed codes of every quantizer, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.groups import aligned, codes_on
from tritonq.nn.qat import QATLayer


@dataclass(frozen=True)
class QuantizerRecord:
    """One quantizer at one step.

    Attributes:
        step: number of the step, from 1.
        name: qualified name of the quantizer.
        scale: mean of its scales.
        clipped: share of values beyond the ends of its grid, by more than half a step.
        flips: of a weight, the share of codes that changed since the record before; None for activations, and for the
            first record.

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

    They show what diverges or oscillates. Weights of embeddings and recurrent layers are not recorded, nor are
    weights that are computed from other parameters.

    Activations are seen by hooks, so that quantizers run by themselves rather than within larger operators: steps give
    the same numbers, and take longer. Each recorded step waits for the device.

    Args:
        model: a prepared model.
        every: record the steps whose numbers, from 1, it divides: with 10 the steps 10, 20, 30 and so on.

    Attributes:
        records: a :class:`QuantizerRecord` per recorded step and quantizer.

    Raises:
        ValueError: a model without fake quantizers to integers that are recorded, or ``every`` below 1.

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
        self._weights: dict[str, QATLayer] = {}
        self._activations: dict[str, FakeQuantizeBase] = {}
        self._hooks: list[RemovableHandle] = []
        weights = {
            layer.weight_fake_quant: layer
            for layer in model.modules()
            if isinstance(layer, QATLayer) and not layer.computed
        }
        for name, module in model.named_modules():
            if not isinstance(module, FakeQuantizeBase):
                continue
            if module in weights:
                self._weights[name] = weights[module]
            elif module.batch_axis is not None:
                self._activations[name] = module
                self._hooks.append(module.register_forward_hook(self._counter(name)))
        if not self._weights and not self._activations:
            raise ValueError(f"{type(model).__name__} has no fake quantizer of integers: call prepare_qat first")

    def _counter(self, name: str) -> Any:
        def count(quantizer: FakeQuantizeBase, args: tuple[Any, ...], output: Tensor) -> None:
            is_recorded = (self._step + 1) % self._every == 0
            if quantizer.training and is_recorded and quantizer.is_enabled_on_host():
                clipped, values = self._seen.get(name, (torch.zeros((), device=args[0].device), 0))
                self._seen[name] = (clipped + _clipped(args[0].detach(), quantizer), values + args[0].numel())

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Count a step; if ``every`` divides its number, append a record of each quantizer that rounds.

        Call it after the optimizer's step: weights are those after it, activations those that ran in training mode
        since the last call.
        """
        self._step += 1
        if self._step % self._every:
            return
        for name, layer in self._weights.items():
            quantizer = layer.weight_fake_quant
            if not isinstance(quantizer, FakeQuantizeBase) or not quantizer.is_enabled_on_host():
                continue
            rows = _near_codes(layer.linear_map.to_rows(layer.weight_to_quantize()), quantizer)
            codes, before = codes_on(rows, quantizer.grid()), self._codes.get(name)
            flips = None if before is None else float((codes != before).float().mean())
            self._codes[name] = codes
            clipped = float(_clipped(rows, quantizer)) / max(1, rows.numel())
            self._add(name, quantizer, clipped, flips)
        for name, (count, values) in self._seen.items():
            self._add(name, self._activations[name], float(count) / max(1, values), None)
        self._seen.clear()

    def _add(self, name: str, quantizer: FakeQuantizeBase, clipped: float, flips: float | None) -> None:
        scale = float(quantizer.calculate_qparams().scale.mean())
        self.records.append(QuantizerRecord(self._step, name, scale, clipped, flips))

    def close(self) -> None:
        """Remove the hooks from the model; nothing is recorded any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _near_codes(rows: Tensor, quantizer: FakeQuantizeBase) -> Tensor:
    """Return values that the quantizer rounds to the nearest code.

    These are ``rows``. If the quantizer takes codes by a paper's formula, they are what it makes of ``rows`` in eval
    mode.
    """
    if quantizer.rounds_to_nearest:
        return rows
    training = quantizer.training
    try:
        return cast(Tensor, quantizer.eval()(rows))
    finally:
        quantizer.train(training)


def _clipped(x: Tensor, quantizer: FakeQuantizeBase) -> Tensor:
    """Return how many values of ``x`` lie more than half a step beyond the ends of the grid; NaN does not count."""
    grid = quantizer.grid()
    scale = aligned(grid.scale.detach(), x, grid.granularity)
    zero = torch.zeros_like(scale) if grid.zero_point is None else aligned(grid.zero_point, x, grid.granularity)
    steps = x / scale + zero
    return ((steps < grid.qtype.quant_min - 0.5) | (steps > grid.qtype.quant_max + 0.5)).sum().float()
