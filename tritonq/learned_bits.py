"""Weights whose bit width is trained with them: a quantizer with one real number of bits per layer (FracBits).

:func:`learned_size` gives the penalty on size, :func:`fix_learned_bits` ends the search. The *step* of a grid is its
scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonq.arithmetic import real_number, whole_number
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.learned_base import LearnedFakeQuantize, floored
from tritonq.learned_fake_quantize import LearnedStepFakeQuantize
from tritonq.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType
from tritonq.reference.fake_quant import arithmetic_dtype

_BITS_PER_BYTE, _FEWEST_BITS = 8, 2
# Steps, in standard deviations, of the symmetric grids of 2 to 8 bits with the least squared error on normally
# distributed values.
NORMAL_STEPS = (1.2240, 0.65077, 0.35341, 0.19325, 0.10549, 0.05726, 0.03087)


class LearnedBitsFakeQuantize(LearnedFakeQuantize):
    """Fake quantization of a weight whose scale (LSQ) and whose number of bits are parameters.

    With a real number of bits ``b = l + a``, ``l`` whole, ``0 <= a <= 1``, training mixes two grids::

        y = (1 - a) Q_l(w) + a Q_{l+1}(w)
        Q_n(w) = s_n round(clip(w / s_n, -q_n, q_n)),  q_n = 2^(n-1) - 1,  s_n = s t_n / t_max

    where ``s`` is the step at ``max_bits``, and ``t_n`` the step that rounds normally distributed values to ``n`` bits
    with the least squared error: fewer bits reach less far, or two would leave hardly more than zeros. So
    ``dy/db = Q_{l+1}(w) - Q_l(w)``; ``w`` has LSQ's gradient through both grids, and so has ``s``, where ``ds_n/ds``
    counts as ``t_max / t_n``: an optimizer's step changes ``s_n`` by the same share as if ``s_n`` were the parameter.
    Eval mode, and what is deployed, round to the nearest whole number of bits; gradients are those of training.
    ``bits`` that an optimizer pushes beyond ``min_bits`` or ``max_bits`` returns there with the next training batch.

    :func:`tritonq.learned_size` is what a penalty on bits is made of; :func:`tritonq.fix_learned_bits` ends the search.

    Args:
        initial_bits: the first value of ``bits``, from ``min_bits`` to ``max_bits``.
        min_bits: at least 2.
        max_bits: at most 8, and more than ``min_bits``.
        ch_axis: 0 for one scale per output channel, or None for one per tensor. All of the weight has one width.

    Attributes:
        scale: float32 parameter, (1,) or (channels,): the step at ``max_bits``. Unless :meth:`initialize` was called
            before, the first training batch sets it to the largest magnitude of the weight (with ``ch_axis=0`` of each
            row), divided by ``2^(max_bits-1) - 1``.
        bits: float32 parameter (1,).
        elements: number of values in the tensor that was rounded last, 0 before; :func:`tritonq.learned_size` counts
            them if the layer has no parameter ``weight``.

    Raises:
        TypeError: ``initial_bits`` is no number.
        ValueError: bounds that are not whole, equal or in the wrong order, or outside of 2 and 8, ``initial_bits``
            beyond them, or another axis.

    Source: Yang and Jin, FracBits: Mixed Precision Quantization via Fractional Bit-Widths, AAAI 2021 (the two grids,
    the penalty on size, rounding at the end); Nikolić et al., BitPruning, 2020; Esser et al., LSQ, 2020 (the scale).

    Examples:
        >>> quantizer = LearnedBitsFakeQuantize(initial_bits=2.5, ch_axis=None)
        >>> quantizer(torch.tensor([[-1.0, 0.4, 0.7, 1.0]]))
        tensor([[-0.4051,  0.3221,  0.4051,  0.4051]], grad_fn=<WhereBackward0>)
        >>> quantizer.eval()(torch.tensor([[-1.0, 0.4, 0.7, 1.0]])).detach(), quantizer.qtype.bits
        (tensor([[-0.3122,  0.3122,  0.3122,  0.3122]]), 2)
    """

    bits: nn.Parameter
    zero_point: Tensor
    relative_steps: Tensor
    elements = 0

    def __init__(
        self, initial_bits: float = 8.0, *, min_bits: int = 2, max_bits: int = 8, ch_axis: int | None = 0
    ) -> None:
        least, most = whole_number(min_bits), whole_number(max_bits)
        if least is None or most is None or not 2 <= least < most <= 8:
            raise ValueError(f"min_bits < max_bits are whole numbers from 2 to 8, got {min_bits!r} and {max_bits!r}")
        min_bits, max_bits = least, most
        number = real_number(initial_bits)
        if number is None:
            raise TypeError(f"initial_bits must be a number, got {initial_bits!r}")
        if not min_bits <= number <= max_bits:
            raise ValueError(f"initial_bits must lie between {min_bits} and {max_bits}, got {initial_bits!r}")
        if ch_axis not in (None, 0):
            raise ValueError(f"weights have a scale per tensor (ch_axis=None) or per out channel (0), got {ch_axis!r}")
        self.bounds = min_bits, max_bits
        # Address and version of the width when it was last read, and the type that it gave.
        self._type_read: tuple[tuple[int, int], QuantizedType] | None = None
        observer = MovingAverageMinMaxObserver if ch_axis is None else MovingAveragePerChannelMinMaxObserver
        dtype = QuantizedType.of(max_bits, narrow=True, axis=ch_axis)
        channel_axis = {} if ch_axis is None else {"ch_axis": ch_axis}
        super().__init__(observer, None, None, dtype=dtype, averaging_constant=1.0, **channel_axis)
        self.scale = nn.Parameter(torch.ones(self._channels))
        self.bits = nn.Parameter(torch.tensor([number]))
        self.register_buffer("zero_point", torch.zeros(self._channels, dtype=torch.int32))
        relative = torch.tensor(NORMAL_STEPS) / NORMAL_STEPS[max_bits - _FEWEST_BITS]
        self.register_buffer("relative_steps", relative, persistent=False)

    @property
    def qtype(self) -> QuantizedType:
        """The type with the whole number of bits, from ``min_bits`` to ``max_bits``, nearest to ``bits``.

        Of two the even one counts: 2 for 2.5. A GPU is read once for each change of the parameter ``bits``.
        """
        if "_parameters" not in vars(self) or "bits" not in self._parameters:
            return self._widest
        version = (self.bits.data_ptr(), self.bits._version)
        if self.bits.is_cpu or self._type_read is None or self._type_read[0] != version:
            bits = round(min(max(float(self.bits.detach()), self.bounds[0]), self.bounds[1]))
            self._type_read = version, QuantizedType.of(bits, narrow=True, axis=self._widest.axis)
        return self._type_read[1]

    @qtype.setter
    def qtype(self, widest: QuantizedType) -> None:
        self._widest = widest

    def allocate(self, num_channels: int) -> None:
        """Give scale, zero point and the observer's buffers one element per channel; ``bits`` stays one number.

        Scales of another length become 1, and zero points 0; both stay the same objects. A quantizer with one scale per
        tensor stays as it is.

        Args:
            num_channels: number of channels.

        Raises:
            ValueError: the observer's buffers have another length already, even if nothing was observed.
        """
        self.activation_post_process.allocate(num_channels)
        if self._widest.axis is not None and self.scale.numel() != num_channels:
            self.scale.data = self.scale.data.new_ones(num_channels)
            # The same object, which others may hold: DDP lists buffers, nn.DataParallel copies from them.
            self.zero_point.resize_(num_channels).zero_()

    def calculate_qparams(self) -> QParams:
        """Return the scale of the grid with the nearest whole number of bits, and the buffer ``zero_point``, zeros."""
        step = self._step_at(torch.tensor(float(self.qtype.bits), device=self.scale.device))
        return QParams(step.detach(), self.zero_point)

    @torch.no_grad()
    def initialize(self, qparams: QParams | None = None) -> None:
        """Set ``scale`` so that the quantizer rounds with ``qparams``, those of the nearest whole number of bits.

        Without ``qparams`` they are the observer's, of ``max_bits``.

        Raises:
            ValueError: no ``qparams`` are given, and the observer has seen nothing.
        """
        if qparams is not None:
            bits = torch.tensor(float(self.qtype.bits), device=qparams.scale.device)
            qparams = qparams._replace(scale=qparams.scale / self._relative_step(bits))
        super().initialize(qparams)

    def fixed(self) -> LearnedStepFakeQuantize:
        """Return a new :class:`LearnedStepFakeQuantize` of the same grid, whose number of bits is no longer trained.

        It has this quantizer's switches, mode and device, and copies of its tensors.
        """
        axis = self._widest.axis
        observer = MovingAverageMinMaxObserver if axis is None else MovingAveragePerChannelMinMaxObserver
        made = LearnedStepFakeQuantize(observer, dtype=self.qtype)
        made.initialize(QParams(*(part.detach().cpu().clone() for part in self.calculate_qparams())))
        made.batch_axis, made.training = self.batch_axis, self.training
        made.fake_quant_enabled.copy_(self.fake_quant_enabled)
        made.observer_enabled.copy_(self.observer_enabled)
        made.initialized.copy_(self.initialized)
        return made.to(self.scale.device)

    def _write(self, qparams: QParams) -> None:
        self.scale.copy_(qparams.scale.view_as(self.scale))

    def _step_at(self, bits: Tensor) -> Tensor:
        """Return the step of the grid with n bits, ``max(scale, eps) · t_n / t_max``: float32, (1,) or (channels,)."""
        return floored(self.scale, self.activation_post_process.eps) * self._relative_step(bits)

    def _relative_step(self, bits: Tensor) -> Tensor:
        """Return ``t_n / t_max``: the step of the grid with so many bits, divided by that with ``max_bits``."""
        return self.relative_steps.take(bits.long() - _FEWEST_BITS)

    def _rounded(self, x: Tensor) -> Tensor:
        self.elements = x.numel()
        if not self.training:
            y = fake_quantize(x, self.grid())
            return with_gradient_of(y, self._between_grids(x)) if needs_gradient(self, x) else y
        with torch.no_grad():
            self.bits.clamp_(*self.bounds)
        return self._between_grids(x)

    def _between_grids(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grids of the whole numbers around ``bits``, mixed by its fraction."""
        bits = self.bits.clamp(*self.bounds)
        low = bits.detach().floor().clamp(max=self.bounds[1] - 1)
        values = x.to(arithmetic_dtype(x.dtype))
        fewer, more = self._on_grid(values, low), self._on_grid(values, low + 1)
        y = fewer + (bits - low) * (more - fewer)
        return torch.where(self.fake_quant_enabled != 0, y, values).to(x.dtype)

    def _on_grid(self, x: Tensor, bits: Tensor) -> Tensor:
        """Round ``x`` to the grid with so many bits, a whole number n in a tensor: the class's ``Q_n(x)``.

        ``dx = dy`` where the code is in range, else 0. The scale gets LSQ's gradient of ``s_n``, with its factor
        ``1/sqrt(N q_n)`` for N values per scale, times ``t_max / t_n``.
        """
        largest = torch.exp2(bits - 1) - 1
        step = self._step_at(bits).to(x.dtype)
        per_scale = x.numel() // max(1, step.numel())
        factor = (largest * max(1, per_scale)).rsqrt() / self._relative_step(bits).to(x.dtype).square()
        step = step.detach() + factor * (step - step.detach())
        steps = x / self._widest.granularity.align(step, x.dim())
        fixed = steps.detach()
        inside = fixed.round().abs() <= largest
        codes = torch.where(inside, steps + (fixed.round() - fixed), fixed.sign() * largest)
        return codes * self._widest.granularity.align(step, x.dim())

    def extra_repr(self) -> str:
        """Return text for ``repr``: ``"bits=3.4 of 2..8, "``, then that of the base class."""
        return f"bits={float(self.bits.detach()):.3g} of {self.bounds[0]}..{self.bounds[1]}, {super().extra_repr()}"


def learned_size(model: nn.Module) -> Tensor:
    """Return the bytes of the weights whose widths are trained, as a tensor with gradients to these widths.

    A penalty ``kappa * (learned_size(model) - target).abs()`` holds a model to a size.

    Args:
        model: a prepared model. A layer without a parameter ``weight``, which computes it from others, must have run
            once.

    Returns:
        0-d float32 tensor: the sum of ``elements * bits / 8`` over these weights.

    Raises:
        ValueError: no weight has a trained width, or a layer that must have run has not.

    Source: Yang and Jin, FracBits, AAAI 2021, the penalty on a model's size.

    Examples:
        >>> import torch, tritonq
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> x, mapping = torch.randn(4, 16), tritonq.get_qconfig_mapping("learned_bits_a8")
        >>> qat = tritonq.prepare_qat(model, qconfig=mapping, example_inputs=x).train()
        >>> size = tritonq.learned_size(qat)             # of the layer between the ends, which have 8 bits
        >>> size.item(), 32 * 32
        (1024.0, 1024)
        >>> loss = qat(x).square().mean() + 1e-3 * (size - 500).abs()
        >>> loss.backward()
        >>> float(qat[2].weight_fake_quant.bits.grad) > 0
        True
    """
    found = _with_learned_bits(model)
    elements = {name: _elements(model, name, quantizer) for name, quantizer in found.items()}
    waiting = [name for name, count in elements.items() if not count]
    if waiting:
        raise ValueError(f"run the model once before its size is asked for: {waiting[0]!r} has seen no weight")
    sizes = [quantizer.bits.sum() * (elements[name] / _BITS_PER_BYTE) for name, quantizer in found.items()]
    return torch.stack(sizes).sum()


def _elements(model: nn.Module, name: str, quantizer: LearnedBitsFakeQuantize) -> int:
    """Return the number of values in a quantizer's weight.

    Args:
        model: the model.
        name: path of the quantizer, such as ``"0.weight_fake_quant"``: the weight is beside it.
        quantizer: if no such weight exists, the number of values that it rounded last counts.
    """
    owner, _, child = name.rpartition(".")
    weight = model.get_submodule(owner)._parameters.get(child.removesuffix("_fake_quant"))
    return quantizer.elements if weight is None else weight.numel()


def fix_learned_bits(model: nn.Module) -> dict[str, int]:
    """End the search, in place: let each weight of trained width have the nearest whole number of bits.

    Its quantizer becomes a :class:`tritonq.LearnedStepFakeQuantize` of the same grid, whose scale trains on. Make the
    optimizer for what follows anew: the quantizers' parameters are others. The paper trains some 80 % of the epochs
    before, and the rest after.

    Args:
        model: a prepared model.

    Returns:
        The number of bits by the path of the quantizer in ``model``.

    Raises:
        ValueError: no weight has a trained width.

    Examples:
        >>> import torch, tritonq
        >>> qconfig = tritonq.get_qconfig("learned_bits_a8")
        >>> x = torch.randn(4, 16)
        >>> qat = tritonq.prepare_qat(nn.Sequential(nn.Linear(16, 8)), qconfig=qconfig, example_inputs=x).train()
        >>> _ = qat[0].weight_fake_quant.bits.data.fill_(3.4)
        >>> fix_learned_bits(qat), type(qat[0].weight_fake_quant).__name__
        ({'0.weight_fake_quant': 3}, 'LearnedStepFakeQuantize')
    """
    found = _with_learned_bits(model)
    made = {quantizer: quantizer.fixed() for quantizer in found.values()}
    for module in model.modules():
        for name, child in module._modules.items():
            if isinstance(child, LearnedBitsFakeQuantize):
                module._modules[name] = made[child]
    return {name: made[quantizer].qtype.bits for name, quantizer in found.items()}


def _with_learned_bits(model: nn.Module) -> dict[str, LearnedBitsFakeQuantize]:
    """Return the quantizers with trained widths by name.

    Raises:
        ValueError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LearnedBitsFakeQuantize)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no weight whose width is trained: use LearnedBitsFakeQuantize")
    return found
