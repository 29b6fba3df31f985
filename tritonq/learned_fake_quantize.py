"""Fake quantizers whose scale is trained with the weights: LSQ, LSQ+, TQT and PACT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tritonq.factory import Factory
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.groups import group_rows
from tritonq.functional.learned_scale import MEGENGINE_FLOOR, StepGradient, learned_fake_quantize, least_error_scale
from tritonq.grid import Grid
from tritonq.learned_base import LearnedFakeQuantize, floored
from tritonq.observers import MinMaxObserver, MovingAverageMinMaxObserver, ObserverBase
from tritonq.qparams import QParams

Initialization = Literal["observer", "lsq", "mse"]


class LearnedStepFakeQuantize(LearnedFakeQuantize):
    """Fake quantization whose scale is a parameter: LSQ, and with a trained zero point LSQ+.

    With method ``"torch"``: ``y = (clip(round(x/s) + z, quant_min, quant_max) - z) s``. Where the unclipped code is in
    range, ``dx = dy`` and the scale gets ``f Σ dy (y - x)/s``, with f the ``grad_factor``; elsewhere ``dx = 0`` and the
    scale gets ``f Σ dy (code - z)`` (:func:`tritonq.functional.fake_quantize_learnable` has both methods' formulas). A
    scale that an optimizer pushes below the observer's ``eps`` counts as ``eps`` and goes on receiving gradients.

    Args:
        observer: observer class or factory that gives the first scale.
        quant_min: smallest code; needs ``quant_max``; None takes the dtype's range.
        quant_max: largest code; needs ``quant_min``.
        method: ``"torch"`` or ``"megengine"`` (``s = |scale| + 1e-5``, ties away from zero).
        init: ``"observer"``, or ``"lsq"`` for ``s = 2 mean|x| / sqrt(q)`` of the first batch, or of all that
            :func:`tritonq.calibrate` saw. q is the largest code, counted from the zero point, to its farther side where
            the type is affine; the zero point is the observer's, so that each side keeps its share of the codes.
            ``"mse"``: the scale of the least squared error of rounding the first batch, or the mean of those of all
            that :func:`tritonq.calibrate` saw (:func:`tritonq.functional.learned_scale.least_error_scale`).
        learn_zero_point: train the zero point too (affine types, method ``"torch"``).
        grad_factor: factor of the gradients of scale and zero point. None takes the papers': for the scale LSQ's
            ``1/sqrt(N quant_max)``, where N counts the values that share a scale, of one sample for activations. The
            zero point moves as LSQ+'s offset ``-s z`` would, which makes its factor ``1/s²``: an offset is trained as
            biases are, whose gradients have no factor.
        **observer_kwargs: passed to the observer (dtype, qscheme, ch_axis, num_channels, eps ...).

    Attributes:
        scale: float32 parameter, (1,), (channels,) or (groups of all channels,); (0,) while their number is unknown.
        zero_point: int32 buffer, or a float32 parameter when trained; shaped as ``scale``.

    Raises:
        ValueError: unknown method or init, a negative or infinite ``grad_factor``, or a trained zero point for a
            symmetric type or MegEngine's method; arguments that the observer refuses; or, with MegEngine's method, a
            type that rounds ties to even.

    Source: docs/numbers.md, "Learned scales"; Esser et al. (2020); Bhalgat et al. (2020); torch.ao's
        _LearnableFakeQuantize.

    Examples:
        >>> quantizer = LearnedStepFakeQuantize(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        >>> quantizer(torch.linspace(-1, 1, 5)).sum().backward()
        >>> quantizer.scale.shape, quantizer.scale.grad is not None
        (torch.Size([1]), True)
    """

    zero_point: Tensor
    first_values: Mapping[str, float] = {"zero_point": 0.0}

    def __init__(
        self,
        observer: type[ObserverBase] | Factory[ObserverBase] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        *,
        method: StepGradient = "torch",
        init: Initialization = "observer",
        learn_zero_point: bool = False,
        grad_factor: float | None = None,
        **observer_kwargs: Any,
    ) -> None:
        if method not in get_args(StepGradient):
            raise ValueError(f"unknown method {method!r}; known: {', '.join(get_args(StepGradient))}")
        if init not in get_args(Initialization):
            raise ValueError(f"unknown init {init!r}; known: {', '.join(get_args(Initialization))}")
        if grad_factor is not None and not 0 <= grad_factor < math.inf:
            raise ValueError(f"grad_factor must be a finite number from 0, got {grad_factor}")
        self.rounding = "half_away" if method == "megengine" else None
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if learn_zero_point and (self.qtype.symmetric or method == "megengine"):
            raise ValueError("a zero point is trained for affine types with method='torch' only")
        self.method: StepGradient = method
        self.init: Initialization = init
        self.grad_factor = grad_factor
        self.learn_zero_point = learn_zero_point
        # Until the parameters are set: the sum of |x|, or of each batch's scale, and how many were added.
        self._sizes: tuple[Tensor, Tensor] | None = None
        self.scale = nn.Parameter(torch.ones(self._channels))
        if learn_zero_point:
            self.zero_point = nn.Parameter(torch.zeros(self._channels))
        else:
            self.register_buffer("zero_point", torch.zeros(self._channels, dtype=torch.int32))

    def allocate(self, num_channels: int) -> None:
        """Give scale, zero point and the observer's buffers their final length.

        Scales of another length become 1, and zero points 0; both stay the same objects. A quantizer with one scale per
        tensor stays as it is.

        Args:
            num_channels: number of scales: channels, or all groups of all channels.

        Raises:
            ValueError: the observer's buffers have another length already, even if nothing was observed.
        """
        super().allocate(num_channels)
        if self.qtype.axis is not None and self.zero_point.numel() != num_channels:
            # The same object, which others may hold: DDP lists buffers, nn.DataParallel copies from them.
            self.zero_point.resize_(num_channels).zero_()

    def calculate_qparams(self) -> QParams:
        """Return the scale that :meth:`forward` rounds with, and the zero point, rounded and clamped, as int32.

        The scale is ``max(scale, eps)``; with ``method="megengine"`` it is ``|scale| + 1e-5``.
        """
        zero_point = self.zero_point.detach().round().clamp(self.qtype.quant_min, self.qtype.quant_max)
        return QParams(self._positive_scale().detach(), zero_point.to(torch.int32))

    def _positive_scale(self) -> Tensor:
        if self.method == "megengine":
            return self.scale.abs() + MEGENGINE_FLOOR
        return floored(self.scale, self.activation_post_process.eps)

    def _write(self, qparams: QParams) -> None:
        floor = MEGENGINE_FLOOR if self.method == "megengine" else 0.0
        self.scale.copy_((qparams.scale.view_as(self.scale) - floor).clamp(min=0))
        self.zero_point.copy_(qparams.zero_point.view_as(self.zero_point))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the observer see ``x``; with ``init="lsq"`` or ``"mse"`` add to the sums for the first scale, too.

        They are the sums of ``|x|``, or of the scales with the least squared error, from which :meth:`initialize`
        computes the scale. The parameters stay as they are until then.
        """
        super().observe(x)
        if self.init == "observer":
            return
        rows = group_rows(x, self.qtype.granularity)
        x = x if rows is None else rows.split(x)
        axis = self.qtype.row_type.axis
        x = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        finite = torch.isfinite(x)
        values, numbers = torch.where(finite, x, 0), finite.sum(1)
        if self.init == "lsq":
            sizes = values.abs().sum(1, dtype=torch.float64)
        else:
            zero_point = self.activation_post_process.calculate_qparams().zero_point.view(-1, 1)
            ends = (self.qtype.quant_min - zero_point, self.qtype.quant_max - zero_point)
            numbers = (numbers > 0).long()
            sizes = least_error_scale(values.float(), *ends).double() * numbers
        total, count = (0, 0) if self._sizes is None else self._sizes
        self._sizes = (total + sizes, count + numbers)

    @torch.no_grad()
    def initialize(self, qparams: QParams | None = None) -> None:
        """Set scale and zero point from ``qparams``, or from what the observer has seen.

        Without ``qparams`` and with ``init="lsq"`` the scale is ``2 mean|x| / sqrt(q)`` of all that :meth:`observe` saw
        since the last call of this method, with ``init="mse"`` the mean of the scales of the least squared error of
        these batches. If it saw none since then, the scale is the observer's, as with ``init="observer"``.

        Raises:
            ValueError: no ``qparams`` are given, and the observer has seen nothing.
        """
        super().initialize(qparams)
        sizes, self._sizes = self._sizes, None
        if qparams is not None or sizes is None:
            return
        mean = (sizes[0] / sizes[1].clamp(min=1)).float().view_as(self.scale)
        if self.init == "mse":
            self.scale.copy_(mean.clamp(min=self.activation_post_process.eps))
            return
        above, below = self.qtype.quant_max - self.zero_point, self.zero_point - self.qtype.quant_min
        largest = above if self.qtype.symmetric else torch.maximum(above, below)
        scale = 2 * mean / largest.clamp(min=1).sqrt()
        self.scale.copy_(scale.clamp(min=self.activation_post_process.eps))

    def _rounded(self, x: Tensor) -> Tensor:
        qtype, codes = self.qtype, None
        scale = self._positive_scale()
        factor = self.grad_factor
        if factor is None:
            factor = 1 / math.sqrt(max(1, self._values_per_scale(x) * max(1, qtype.quant_max)))
        shift = self._trained_zero_point(scale.detach(), factor) if self.learn_zero_point else None
        if qtype.fixed_zero_point != 0:
            codes = self.zero_point.detach().round().clamp(qtype.quant_min, qtype.quant_max).to(torch.int32)
        if self.method == "megengine" and codes is not None and not self.training:
            # Clipping before rounding turns ties over where z is not 0. Deployment rounds first; eval agrees with it.
            scale = scale.detach()
            return fake_quantize(x, Grid(scale, codes, qtype, self.fake_quant_enabled))
        grid = Grid(scale, codes, qtype, self.fake_quant_enabled)
        return learned_fake_quantize(x, grid, self.method, factor, shift=shift)

    def _values_per_scale(self, x: Tensor) -> float:
        """Return the number N in LSQ's factor ``1/sqrt(N quant_max)``.

        It is the number of values that share a scale, of one sample if ``x`` is a batch.
        """
        has_samples = x.dim() > 1 and self.batch_axis is not None and self.qtype.axis != self.batch_axis
        samples = x.shape[cast(int, self.batch_axis)] if has_samples else 1
        return x.numel() / max(1, samples * self.scale.numel())

    def _trained_zero_point(self, scale: Tensor, factor: float) -> Tensor:
        """Return the parameter ``zero_point``; with the papers' factors its gradient is divided by ``factor · scale²``.

        The operator multiplies by ``factor`` again, so that the step is that of the offset ``-scale · zero_point``.
        """
        if self.grad_factor is not None:
            return self.zero_point
        fixed = self.zero_point.detach()
        return fixed + (self.zero_point - fixed) * (scale.square() * factor).reciprocal()


class TrainedThresholdFakeQuantize(LearnedFakeQuantize):
    """Fake quantization with scale ``2^t``, where t is trained (TQT): signed, or unsigned behind a ReLU.

    ``code = clip(round(x/s), quant_min, quant_max)``, ties away from zero, and ``y = code · s`` with ``s = 2^t``. A
    value is inside if ``x/s`` is in ``[quant_min - 0.5, quant_max + 0.5]``: there ``dx = dy``, elsewhere 0;
    ``dt = Σ dy s ln2 {code - x/s inside | code outside}``.

    Args:
        observer: observer class or factory that gives the first scale.
        quant_min: smallest code; needs ``quant_max``; None takes the dtype's range.
        quant_max: largest code; needs ``quant_min``.
        **observer_kwargs: passed to the observer; its ``dtype`` is ``"qint8"`` unless given.

    Attributes:
        log2_threshold: float32 parameter t, (1,), (channels,) or (groups of all channels,); (0,) while their number is
            unknown.

    Raises:
        ValueError: a type that does not allow a zero point of 0: neither symmetric and signed, nor affine with codes
            from 0 on; or one that rounds ties to even, or arguments that the observer refuses.

    Warns:
        UserWarning: with codes from 0 on t is set from a zero point above 0, so that values below 0 become 0. The scale
            is then the largest value of the observer's grid, at least one step of it, divided by ``quant_max``.

    Source: docs/numbers.md, "Learned scales"; Jain et al. (2020); MegEngine's TQT.

    Examples:
        >>> quantizer = TrainedThresholdFakeQuantize(dtype="qint8")
        >>> y = quantizer(torch.tensor([-1.0, 0.5]))
        >>> torch.equal(torch.exp2(quantizer.log2_threshold), quantizer.calculate_qparams().scale)
        True
    """

    rounding = "half_away"
    first_values: Mapping[str, float] = {"log2_threshold": 0.0}

    def __init__(
        self,
        observer: type[ObserverBase] | Factory[ObserverBase] = MinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **observer_kwargs: Any,
    ) -> None:
        observer_kwargs.setdefault("dtype", "qint8")
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if self.qtype.fixed_zero_point != 0 and (self.qtype.symmetric or self.qtype.quant_min != 0):
            raise ValueError(
                f"trained thresholds have zero point 0, which {self.qtype} does not: use a symmetric signed type, or "
                'behind a ReLU an affine one whose codes start at 0 ("quint8")'
            )
        self.log2_threshold = nn.Parameter(torch.zeros(self._channels))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale ``2^t``, shaped as t, without gradient."""
        return torch.exp2(self.log2_threshold.detach())

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """Zeros, int32, in the shape of :attr:`scale`."""
        return torch.zeros_like(self.log2_threshold, dtype=torch.int32)

    def _write(self, qparams: QParams) -> None:
        scale = qparams.scale if self.qtype.symmetric else self._top(qparams) / self.qtype.quant_max
        self.log2_threshold.copy_(torch.log2(scale).view_as(self.log2_threshold))

    def _rounded(self, x: Tensor) -> Tensor:
        grid = Grid(torch.exp2(self.log2_threshold), None, self.qtype, self.fake_quant_enabled)
        return learned_fake_quantize(x, grid, "tqt")


class ClippedFakeQuantize(LearnedFakeQuantize):
    """Clip to ``[0, alpha]`` with a trained alpha and fake quantize to unsigned codes (PACT); for ReLU outputs.

    ``y = round(clip(x, 0, alpha) / s) * s`` with ``s = alpha / quant_max``; ``dx = dy`` where ``0 <= x < alpha``, else
    0; ``dalpha = Σ dy`` over ``x >= alpha``. If an optimizer pushes alpha below ``quant_max * eps``, with eps of the
    observer, ``quant_max * eps`` takes its place, and alpha goes on receiving gradients.

    Args:
        observer: observer class or factory; alpha begins at the largest value of the grid that it proposes.
        quant_min: 0; needs ``quant_max``. None takes the dtype's range.
        quant_max: largest code; needs ``quant_min``. None takes the dtype's range.
        **observer_kwargs: passed to the observer; ``dtype`` is ``"quint8"`` by default.

    Attributes:
        alpha: float32 parameter, (1,), (channels,) or (groups of all channels,); (0,) while their number is unknown.

    Raises:
        ValueError: a type that is symmetric, or whose smallest code is not 0; or arguments that the observer refuses.

    Warns:
        UserWarning: alpha is set from a zero point above 0, so that values below 0 become 0.

    Source: docs/numbers.md, "Learned scales"; Choi et al. (2018).

    Examples:
        >>> quantizer = ClippedFakeQuantize(dtype="quint4")
        >>> quantizer(torch.tensor([0.0, 0.65, 3.0])).detach()
        tensor([0.0000, 0.6000, 3.0000])
    """

    def __init__(
        self,
        observer: type[ObserverBase] | Factory[ObserverBase] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **observer_kwargs: Any,
    ) -> None:
        observer_kwargs.setdefault("dtype", "quint8")
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if self.qtype.quant_min != 0 or self.qtype.symmetric:
            raise ValueError(f"clipping to [0, alpha] takes an affine type whose codes start at 0, got {self.qtype}")
        self.alpha = nn.Parameter(torch.ones(self._channels))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale ``max(alpha, quant_max * eps) / quant_max``, shaped as alpha, without gradient."""
        return self._positive_alpha().detach() / self.qtype.quant_max

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """Zeros, int32, in the shape of :attr:`scale`."""
        return torch.zeros_like(self.alpha, dtype=torch.int32)

    def _positive_alpha(self) -> Tensor:
        return floored(self.alpha, self.activation_post_process.eps * self.qtype.quant_max)

    def _write(self, qparams: QParams) -> None:
        self.alpha.copy_(self._top(qparams).view_as(self.alpha))

    def _rounded(self, x: Tensor) -> Tensor:
        grid = Grid(self._positive_alpha(), None, self.qtype, self.fake_quant_enabled)
        return learned_fake_quantize(x, grid, "pact")
