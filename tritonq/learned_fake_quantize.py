"""Fake quantizers whose scale is trained with the weights: LSQ, LSQ+, TQT and PACT."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tritonq.factory import Factory
from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.learned_scale import MEGENGINE_FLOOR, StepGradient, learned_fake_quantize
from tritonq.functional.recomputation import is_recomputing
from tritonq.grid import Grid
from tritonq.observers import MinMaxObserver, MovingAverageMinMaxObserver, ObserverBase
from tritonq.qparams import QParams, Rounding
from tritonq.warn_once import warn_once

Initialization = Literal["observer", "lsq"]


class LearnedFakeQuantize(FakeQuantizeBase):
    """What trained quantizers share: float32 parameters, and an observer that gives them their first values.

    The parameters are set from the first training batch, or by :meth:`initialize` from what the observer has seen by
    then (after :func:`tritonq.calibrate`). Until then values pass through, with one warning.

    Attributes:
        activation_post_process: the observer.
        initialized: uint8 buffer (1,).
    """

    initialized: Tensor
    rounding: Rounding = "half_even"

    def __init__(
        self,
        observer: type[ObserverBase] | Factory[ObserverBase],
        quant_min: int | None,
        quant_max: int | None,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None or quant_max is not None:
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        self.activation_post_process = observer(**{"rounding": self.rounding, **observer_kwargs})
        self.qtype = self.activation_post_process.qtype
        if self.qtype.rounding != self.rounding:
            raise ValueError(f"{type(self).__name__} rounds {self.rounding}, got rounding={self.qtype.rounding!r}")
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.uint8))

    @property
    def _channels(self) -> int:
        """Length of the parameters; 0 per channel while unknown."""
        return 1 if self.qtype.axis is None else self.activation_post_process.num_channels or 0

    @abstractmethod
    def _write(self, qparams: QParams) -> None:
        """Set the parameters to what ``qparams`` say."""

    @abstractmethod
    def _rounded(self, x: Tensor) -> Tensor:
        """``x`` fake quantized by the present parameters."""

    def allocate(self, num_channels: int) -> None:
        """Give per-channel parameters their final length; they stay the same objects, so optimizers keep them."""
        self.activation_post_process.allocate(num_channels)
        if self.qtype.axis is not None:
            for parameter in self.parameters():
                if parameter.numel() != num_channels:
                    parameter.data = parameter.data.new_ones(num_channels)

    def rests_on_data(self) -> Tensor:
        """See base class."""
        return self.initialized

    def observe(self, x: Tensor) -> None:
        """Let the observer see ``x``; the parameters stay as they are."""
        if self.qtype.axis is not None:
            self.allocate(x.shape[self.qtype.axis])
        self.activation_post_process(x.detach())

    @torch.no_grad()
    def initialize(self, qparams: QParams | None = None) -> None:
        """Set the parameters from ``qparams``, or from what the observer has seen.

        Raises:
            ValueError: no qparams given, and the observer has seen nothing.
        """
        if qparams is None:
            if not bool(self.activation_post_process.has_observed()):
                raise ValueError(f"the observer of this {type(self).__name__} has seen no finite value")
            qparams = self.activation_post_process.calculate_qparams()
        if self.qtype.axis is not None:
            self.allocate(qparams.scale.numel())
        self._write(qparams)
        self.initialized.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize ``x``; the first training batch sets the parameters."""
        if torch.compiler.is_compiling() and not self._qparams_known:
            raise NotImplementedError(
                f"torch.compile can't set the parameters of a {type(self).__name__}: run the model once on a batch, or "
                "call initialize(), before it is compiled"
            )
        if self.training and not self.has_qparams() and bool(self.observer_enabled) and not is_recomputing():
            self._initialize_from_batch(x.detach())
        if not self.has_qparams():
            warn_once(
                self,
                f"a {type(self).__name__} without parameters passes its input through; run it in training mode "
                "with its observer enabled, call initialize(), or load a checkpoint",
                stacklevel=3,
            )
            return x
        return self._rounded(x)

    def _initialize_from_batch(self, x: Tensor) -> None:
        """What :meth:`forward` does with the first training batch; one without a finite value changes nothing."""
        self.observe(x)
        if bool(self.activation_post_process.has_observed()):
            self.initialize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedFakeQuantize:
        """Parameters, like buffers, stay float32 in a model of any dtype."""
        before = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != old.dtype:
                parameter.data = old.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Adopt the channel count of a checkpoint where none was known, and ask anew whether parameters are set."""
        for name in self._parameters:
            saved = state_dict.get(prefix + name)
            if self.qtype.axis is not None and self._channels == 0 and isinstance(saved, Tensor) and saved.numel():
                self.allocate(saved.numel())
        self._qparams_known = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Grid and switches."""
        return (
            f"{self.qtype}, initialized={bool(self.initialized)}, fake_quant={bool(self.fake_quant_enabled)}, "
            f"observer={bool(self.observer_enabled)}"
        )


class LearnedStepFakeQuantize(LearnedFakeQuantize):
    """Fake quantization whose scale is a parameter: LSQ, and with a trained zero point LSQ+.

    Formula and gradients: :func:`tritonq.functional.fake_quantize_learnable`. A scale that an optimizer pushes below
    ``eps`` counts as ``eps`` and goes on receiving gradients.

    Args:
        observer: observer class or factory that gives the first scale.
        quant_min: smallest code; needs ``quant_max``.
        quant_max: largest code.
        method: ``"torch"`` or ``"megengine"`` (``s = |scale| + 1e-5``, ties away from zero).
        init: ``"observer"``, or ``"lsq"`` for ``2 mean|x| / sqrt(quant_max)`` of the first batch.
        learn_zero_point: train the zero point too (affine types, method ``"torch"``).
        grad_factor: factor of the scale's gradient; None takes LSQ's ``1/sqrt(values per scale * quant_max)``.
        **observer_kwargs: passed to the observer (dtype, qscheme, ch_axis, num_channels, eps ...).

    Attributes:
        scale: float32 parameter, (1,) or (channels,).
        zero_point: int32 buffer, or a float32 parameter when trained.

    Raises:
        ValueError: unknown method or init, or a trained zero point for a symmetric type or MegEngine's method.

    Source: SEMANTICS section 1; Esser et al. (2020); Bhalgat et al. (2020); torch.ao's _LearnableFakeQuantize.

    Examples:
        >>> quantizer = LearnedStepFakeQuantize(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        >>> quantizer(torch.linspace(-1, 1, 5)).sum().backward()
        >>> quantizer.scale.shape, quantizer.scale.grad is not None
        (torch.Size([1]), True)
    """

    zero_point: Tensor

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
        self.rounding = "half_away" if method == "megengine" else "half_even"
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if learn_zero_point and (self.qtype.symmetric or method == "megengine"):
            raise ValueError("a zero point is trained for affine types with method='torch' only")
        self.method: StepGradient = method
        self.init: Initialization = init
        self.grad_factor = grad_factor
        self.learn_zero_point = learn_zero_point
        self.scale = nn.Parameter(torch.ones(self._channels))
        if learn_zero_point:
            self.zero_point = nn.Parameter(torch.zeros(self._channels))
        else:
            self.register_buffer("zero_point", torch.zeros(self._channels, dtype=torch.int32))

    def allocate(self, num_channels: int) -> None:
        """See base class."""
        super().allocate(num_channels)
        if self.qtype.axis is not None and self.zero_point.numel() != num_channels:
            self.zero_point = self.zero_point.new_zeros(num_channels)

    def calculate_qparams(self) -> QParams:
        """See base class."""
        zero_point = self.zero_point.detach().round().clamp(self.qtype.quant_min, self.qtype.quant_max)
        return QParams(self._positive_scale().detach(), zero_point.to(torch.int32))

    def _positive_scale(self) -> Tensor:
        if self.method == "megengine":
            return self.scale.abs() + MEGENGINE_FLOOR
        return _floored(self.scale, self.activation_post_process.eps)

    def _write(self, qparams: QParams) -> None:
        floor = MEGENGINE_FLOOR if self.method == "megengine" else 0.0
        self.scale.copy_((qparams.scale.view_as(self.scale) - floor).clamp(min=0))
        self.zero_point.copy_(qparams.zero_point.view_as(self.zero_point))

    def _initialize_from_batch(self, x: Tensor) -> None:
        super()._initialize_from_batch(x)
        if self.init == "lsq" and bool(self.initialized):
            finite = torch.where(torch.isfinite(x), x, 0).float().abs()
            axes = [axis for axis in range(x.dim()) if axis != self.qtype.axis]
            mean = finite.mean(axes) if axes else finite
            with torch.no_grad():
                scale = (2 / math.sqrt(max(1, self.qtype.quant_max)) * mean).clamp(min=self.activation_post_process.eps)
                self.scale.copy_(scale.view_as(self.scale))

    def _rounded(self, x: Tensor) -> Tensor:
        qtype, codes = self.qtype, None
        shift = self.zero_point if self.learn_zero_point else None
        scale = self._positive_scale()
        if qtype.fixed_zero_point != 0:
            codes = self.zero_point.detach().round().clamp(qtype.quant_min, qtype.quant_max).to(torch.int32)
        if self.method == "megengine" and codes is not None and not self.training:
            # Clipping before rounding turns ties over where z is not 0. Deployment rounds first; eval agrees with it.
            scale = scale.detach()
            return fake_quantize(x, Grid(scale, codes, qtype, self.fake_quant_enabled))
        factor = self.grad_factor
        if factor is None:
            factor = 1 / math.sqrt(max(1, x.numel() / max(1, scale.numel()) * max(1, qtype.quant_max)))
        grid = Grid(scale, codes, qtype, self.fake_quant_enabled)
        return learned_fake_quantize(x, grid, self.method, factor, shift=shift)


class TrainedThresholdFakeQuantize(LearnedFakeQuantize):
    """Fake quantization with scale ``2^t``, where t is trained (TQT); symmetric types.

    Formula and gradient: :func:`tritonq.functional.trained_threshold_quantize`.

    Args:
        observer: observer class or factory that gives the first scale.
        quant_min: smallest code; needs ``quant_max``.
        quant_max: largest code.
        **observer_kwargs: passed to the observer.

    Attributes:
        log2_threshold: float32 parameter t, (1,) or (channels,).

    Raises:
        ValueError: a type whose zero point is not 0.

    Source: SEMANTICS section 1; Jain et al. (2020); MegEngine's TQT.

    Examples:
        >>> quantizer = TrainedThresholdFakeQuantize(dtype="qint8")
        >>> y = quantizer(torch.tensor([-1.0, 0.5]))
        >>> torch.equal(torch.exp2(quantizer.log2_threshold), quantizer.calculate_qparams().scale)
        True
    """

    rounding = "half_away"

    def __init__(
        self,
        observer: type[ObserverBase] | Factory[ObserverBase] = MinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **observer_kwargs: Any,
    ) -> None:
        observer_kwargs.setdefault("dtype", "qint8")
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if self.qtype.fixed_zero_point != 0:
            raise ValueError(f"trained thresholds have zero point 0, which {self.qtype} does not")
        self.log2_threshold = nn.Parameter(torch.zeros(self._channels))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """``2^t``."""
        return torch.exp2(self.log2_threshold.detach())

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """Zeros, int32."""
        return torch.zeros_like(self.log2_threshold, dtype=torch.int32)

    def _write(self, qparams: QParams) -> None:
        self.log2_threshold.copy_(torch.log2(qparams.scale).view_as(self.log2_threshold))

    def _rounded(self, x: Tensor) -> Tensor:
        grid = Grid(torch.exp2(self.log2_threshold), None, self.qtype, self.fake_quant_enabled)
        return learned_fake_quantize(x, grid, "tqt")


class ClippedFakeQuantize(LearnedFakeQuantize):
    """Clip to ``[0, alpha]`` with a trained alpha and fake quantize to unsigned codes (PACT); for ReLU outputs.

    Formula and gradient: :func:`tritonq.functional.clipped_quantize`. An alpha that an optimizer pushes below
    ``quant_max * eps`` counts as that.

    Args:
        observer: observer class or factory that gives the first alpha: its largest value.
        quant_min: 0.
        quant_max: largest code.
        **observer_kwargs: passed to the observer.

    Attributes:
        alpha: float32 parameter, (1,) or (channels,).

    Raises:
        ValueError: a type that is symmetric, or whose smallest code is not 0.

    Source: SEMANTICS section 1; Choi et al. (2018).

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
        """``alpha / quant_max``."""
        return self._positive_alpha().detach() / self.qtype.quant_max

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """Zeros, int32."""
        return torch.zeros_like(self.alpha, dtype=torch.int32)

    def _positive_alpha(self) -> Tensor:
        return _floored(self.alpha, self.activation_post_process.eps * self.qtype.quant_max)

    def _write(self, qparams: QParams) -> None:
        # The top of the observed grid; values below zero are clipped anyway.
        top = qparams.scale * (self.qtype.quant_max - qparams.zero_point)
        self.alpha.copy_(top.view_as(self.alpha))

    def _rounded(self, x: Tensor) -> Tensor:
        grid = Grid(self._positive_alpha(), None, self.qtype, self.fake_quant_enabled)
        return learned_fake_quantize(x, grid, "pact")


def _floored(parameter: Tensor, floor: float) -> Tensor:
    """The parameter, or ``floor`` where that is larger; the gradient passes, or a parameter would stay at its floor."""
    fixed = parameter.detach()
    return fixed.clamp(min=floor) + (parameter - fixed)
