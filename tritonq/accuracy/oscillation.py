"""Against weights that oscillate between two codes: a loss that draws them to the middle of a code, and freezing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.accuracy.quantized_layers import check_rounds_to_nearest, owns_weight, write_quantized_weight
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.groups import aligned, codes_on
from tritonq.grid import Grid
from tritonq.nn.qat import QATLayer


def oscillation_dampening(model: nn.Module) -> Tensor:
    """Return ``Σ |FQ(w) - clip(w, s n, s p)|²`` over all quantized weights: a loss to be added with a small factor.

    s is the scale, n and p are the smallest and the largest code less the zero point. The loss draws each weight to the
    middle of its code, where an optimizer's steps no longer carry it to the next code. FQ(w) and the bounds ``s n`` and
    ``s p`` receive no gradient, nor do clipped weights. With a BatchNorm folded in, w is the folded weight, and γ gets
    a gradient, too; not where the layer's ``mode`` of folding is ``"scale"``, in which w is not folded.

    Args:
        model: a prepared model. Weights that are computed in the forward, in float formats, or whose quantizer is off
            or has no scale yet, are left out, and so are embeddings and recurrent layers.

    Returns:
        A float32 scalar on the weights' device; 0, without a gradient, if all weights are left out.

    Raises:
        ValueError: a weight whose codes follow from a formula of the whole tensor (DoReFa, binary, ternary).

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022), equation 5; the factor rises
        there from 0 to between 1e-4 and 1e-2 by a cosine.

    Examples:
        >>> import tritonq
        >>> layer = tritonq.nn.Linear(4, 2, qconfig=tritonq.get_qconfig("lsq_w4a4"))
        >>> _ = layer(torch.rand(3, 4))
        >>> loss = 1e-3 * oscillation_dampening(layer)
        >>> loss.backward()
    """
    total = torch.zeros(())
    for layer in _layers(model).values():
        rows, grid = _seen(layer)
        with torch.no_grad():
            values = _values(codes_on(rows, grid), grid)
            low, high = (
                _values(torch.full_like(rows, code), grid) for code in (grid.qtype.quant_min, grid.qtype.quant_max)
            )
        total = total.to(rows.device) + (values - torch.minimum(torch.maximum(rows, low), high)).square().sum()
    return total


@dataclass
class _Memory:
    """What :class:`OscillationFreezing` remembers of one layer's codes, in the shape of its rows (out, ...).

    Attributes:
        codes: after the last step.
        direction: sign of each code's last change; 0 before the first.
        frequency: f of :class:`OscillationFreezing`: the averaged share of steps in which the code turned.
        average: a of :class:`OscillationFreezing`: the averaged code.
        frozen: whether the weight is frozen, bool.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor


class OscillationFreezing:
    """Freezes weights that oscillate between codes, at the code where they were most of the time.

    Call :meth:`step` once per training step, after the optimizer's. From each weight's code q it computes

        ``o = 1 if q turned, else 0``, ``f ← m o + (1 - m) f``, ``a ← m q + (1 - m) a``,

    where to turn is to change in the other direction than at the last change. A weight whose f exceeds ``threshold`` is
    frozen at code ``round(a)`` from then on: each :meth:`step` sets it back there, on the grid as it then is.

    Args:
        model: a prepared model. Weights that are computed in the forward, in float formats, or whose quantizer is off
            or has no scale yet, are left out, and so are embeddings and recurrent layers.
        threshold: the largest f of a weight that stays free; f is the averaged share of steps in which it turns.
        momentum: m, the factor of the present step in both averages.

    Raises:
        ValueError: a threshold or momentum outside (0, 1], a model without quantized layers, or a weight whose codes
            follow from a formula of the whole tensor (DoReFa, binary, ternary).

    Source: Nagel et al. (2022), algorithm 1.

    Examples:
        >>> import tritonq
        >>> layer = tritonq.nn.Linear(4, 2, qconfig=tritonq.get_qconfig("lsq_w4a4"))
        >>> freezing, optimizer = OscillationFreezing(layer), torch.optim.SGD(layer.parameters(), 0.1)
        >>> layer(torch.rand(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> freezing.step()
        >>> freezing.frozen_share()
        0.0
    """

    def __init__(self, model: nn.Module, threshold: float = 0.02, momentum: float = 0.01) -> None:
        for name, value in (("threshold", threshold), ("momentum", momentum)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        if not any(isinstance(module, QATLayer) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has no quantized layer: call prepare_qat first")
        _layers(model)
        self.threshold, self.momentum = threshold, momentum
        self._model = model
        self._memories: dict[str, _Memory] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update f and a with the present codes, freeze weights whose f exceeds the threshold, set frozen ones back.

        f is how often a weight turns, a its mean code; a no longer changes once the weight is frozen. The first call
        only notes the codes. Weights change in place; quantizers stay as they are.
        """
        for name, layer in _layers(self._model).items():
            rows, grid = _seen(layer)
            codes = codes_on(rows, grid)
            memory = self._memories.get(name)
            if memory is None:
                zeros = torch.zeros_like(codes)
                self._memories[name] = _Memory(codes, zeros, zeros.clone(), codes.clone(), zeros.bool())
                continue
            change = (codes - memory.codes).sign()
            turned = (change != 0) & (memory.direction != 0) & (change != memory.direction)
            memory.direction = torch.where(change != 0, change, memory.direction)
            memory.frequency.lerp_(turned.to(codes.dtype), self.momentum)
            memory.average = torch.where(memory.frozen, memory.average, memory.average.lerp(codes, self.momentum))
            memory.frozen |= memory.frequency > self.threshold
            frozen_codes = memory.average.round()
            memory.codes = torch.where(memory.frozen, frozen_codes, codes)
            if bool(memory.frozen.any()):
                target = torch.where(memory.frozen, _values(frozen_codes, grid), rows)
                write_quantized_weight(layer, target, memory.frozen)

    def frozen_share(self) -> float:
        """Return the frozen weights' share of all weights that :meth:`step` has seen; 0 before its first call."""
        sizes = sum(memory.frozen.numel() for memory in self._memories.values())
        return sum(int(memory.frozen.sum()) for memory in self._memories.values()) / max(1, sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: by layer's qualified name, a dict of tensors.

        Its keys are ``codes``, ``direction`` (sign of the last change), ``frequency`` (f), ``average`` (a) and
        ``frozen`` (bool), each (out, ...). The tensors are copies on the layer's device, which later steps do not
        change. Before the first step the state is empty.
        """
        return {name: _copied(vars(memory)) for name, memory in self._memories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned; its tensors are copied to the devices of the layers.

        It takes the place of the present state. A layer that ``state`` does not have begins anew at the next
        :meth:`step`. Weights do not change here, and shapes are not checked.

        Raises:
            ValueError: the model lacks a layer of the state.
        """
        modules = dict(self._model.named_modules())
        for name in state:
            if not isinstance(modules.get(name), QATLayer):
                raise ValueError(f"the model has no layer {name!r}, of which the state tells")
        self._memories = {name: _Memory(**_copied(held, modules[name].weight.device)) for name, held in state.items()}


def _copied(tensors: dict[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {name: value.to(device or value.device, copy=True) for name, value in tensors.items()}


def _layers(model: nn.Module) -> dict[str, QATLayer]:
    """Return the layers, by name, that own their weight and have a quantizer to integers for it, which is on.

    Raises:
        ValueError: one of these quantizers does not round to the nearest code.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if owns_weight(layer)
        and isinstance(layer.weight_fake_quant, FakeQuantizeBase)
        and layer.weight_fake_quant.is_enabled_on_host()
    }
    check_rounds_to_nearest(found, "what ends oscillations")
    return found


def _seen(layer: QATLayer) -> tuple[Tensor, Grid]:
    """Return the weight as its quantizer gets it, as rows (out, ...), and the grid."""
    rows = layer.linear_map.to_rows(layer.weight_to_quantize())
    grid = layer.weight_fake_quant.grid()  # type: ignore[operator]
    zero_point = None if grid.zero_point is None else grid.zero_point.detach()
    return rows, Grid(grid.scale.detach(), zero_point, grid.qtype)


def _values(codes: Tensor, grid: Grid) -> Tensor:
    scale = aligned(grid.scale, codes, grid.granularity)
    if grid.zero_point is None:
        return codes * scale
    return (codes - aligned(grid.zero_point, codes, grid.granularity).to(scale.dtype)) * scale
