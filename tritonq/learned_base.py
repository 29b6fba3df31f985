"""The base class of fake quantizers with trained parameters (scale, threshold, number of bits)."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritonq.code_precision import to_hold_codes
from tritonq.factory import Factory, make_observer
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.recomputation import is_recomputing
from tritonq.functional.validate import check_float_tensor
from tritonq.observers import ObserverBase
from tritonq.outliers import tells_range
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType, Rounding
from tritonq.rank_ranges import RankState, join_ranks
from tritonq.warn_once import warn_once


class LearnedFakeQuantize(FakeQuantizeBase):
    """Base class of trained quantizers: float32 parameters, and an observer that gives them their first values.

    The parameters are set from the first training batch, or by :meth:`initialize` from what the observer has seen by
    then (after :func:`tritonq.calibrate`). Until then values pass through, with one warning; where `prepare_qat`
    recorded the model, they are rounded by what its example inputs gave.

    Args:
        observer: observer class or factory that gives the first values of the parameters.
        quant_min: smallest code; needs ``quant_max``; None takes the dtype's range.
        quant_max: largest code; needs ``quant_min``.
        **observer_kwargs: passed to the observer (dtype, qscheme, ch_axis, num_channels, eps ...).

    Attributes:
        activation_post_process: the observer.
        initialized: uint8 buffer (1,), 1 once the parameters are set.
        begins: uint8 buffer (1,), in no state dict: 1 while the parameters are those of example inputs, which the first
            training batch replaces.
        first_values: what parameters hold until they are set, by name, such as ``{"zero_point": 0.0}``; 1 for names
            that it lacks.

    Raises:
        ValueError: the observer refuses its arguments, or its type rounds ties otherwise than the subclass.
    """

    initialized: Tensor
    begins: Tensor
    # How ties are rounded, where the scheme fixes it.
    rounding: Rounding | None = None
    # What trained parameters hold until they are set, by name; 1 if it isn't here.
    first_values: Mapping[str, float] = {}

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
        given = observer_kwargs.get("dtype")
        if self.rounding is not None and not isinstance(given, QuantizedType):
            observer_kwargs.setdefault("rounding", self.rounding)
        self.activation_post_process = make_observer(observer, **observer_kwargs)
        self.qtype = self.activation_post_process.qtype
        if self.rounding not in (None, self.qtype.rounding):
            raise ValueError(f"{type(self).__name__} rounds {self.rounding}, got rounding={self.qtype.rounding!r}")
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.uint8))
        self.register_buffer("begins", torch.zeros(1, dtype=torch.uint8), persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled module; one of version 0.1.0 lacks the flag ``begins``, which is added."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "begins" not in self._buffers:
            self.register_buffer("begins", torch.zeros_like(self.initialized), persistent=False)

    @torch.no_grad()
    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters that a run on example inputs gave, until the first training batch replaces them.

        So averages of the model (EMA, SWA) round from the first step on.

        Args:
            state: this module's parameters and buffers after that run, by name such as ``"scale"``; the values are
                copied. Names with a dot, the observer's, are ignored. Per channel every parameter must be there; with
                one scale per tensor, one that is missing keeps its value.
        """
        own = {name: tensor for name, tensor in state.items() if "." not in name}
        if self.qtype.axis is not None:
            self.allocate(next(own[name].numel() for name, _ in self.named_parameters()))
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, tensor in own.items():
            held[name].copy_(tensor)
        self._beginning = self._scale_on_host()
        self.initialized.fill_(1)
        self.begins.fill_(1)
        self._qparams_known = False

    def rests_on_examples(self) -> bool:
        """Whether the parameters are still those that the example inputs of ``prepare_qat`` gave.

        False if no run on example inputs gave them, once a training batch or a loaded state replaced them, and for a
        weight's quantizer, whose parameters follow from the weight.
        """
        return self.batch_axis is not None and super().rests_on_examples()

    @property
    def _channels(self) -> int:
        """Number of elements of each parameter: 1 per tensor; per channel 0 as long as it is unknown."""
        return 1 if self.qtype.axis is None else self.activation_post_process.num_channels or 0

    @abstractmethod
    def _write(self, qparams: QParams) -> None:
        """Set the trained parameters in place, so that the quantizer rounds with ``qparams``, as far as its scheme can.

        :meth:`initialize` calls it without recording gradients, once the parameters have their final length. They must
        stay the same objects, since optimizers hold them.
        """

    @abstractmethod
    def _rounded(self, x: Tensor) -> Tensor:
        """Return ``x`` fake quantized with the present parameters; ``x`` itself while rounding is switched off.

        The result has the dtype of ``x``. It is differentiable in ``x`` and in the trained parameters. :meth:`forward`
        calls it in training and in eval mode, once the parameters are set.
        """

    def allocate(self, num_channels: int) -> None:
        """Give per-channel parameters and the observer's buffers their final length.

        Parameters of another length get their ``first_values``. They stay the same objects, so that optimizers keep
        them. A quantizer with one scale per tensor stays as it is.

        Args:
            num_channels: number of scales: channels, or all groups of all channels.

        Raises:
            ValueError: the observer's buffers have another length already, even if nothing was observed.
        """
        self.activation_post_process.allocate(num_channels)
        if self.qtype.axis is not None:
            for name, parameter in self.named_parameters():
                if parameter.numel() != num_channels:
                    parameter.data = parameter.data.new_full((num_channels,), self.first_values.get(name, 1.0))

    def rests_on_data(self) -> Tensor:
        """Return the buffer ``initialized``: 1 once the parameters were set, also if only example inputs gave them."""
        return self.initialized

    def rank_state(self) -> RankState:
        """Return as ``first`` the trained parameters and the buffer ``zero_point``, if any: the tensors, no copies.

        All ranks take the first rank's values of them.
        """
        own = self.parameters(recurse=False)
        zero_point = self._buffers.get("zero_point")
        return RankState(first=[*own, *([] if zero_point is None else [zero_point])])

    def observe(self, x: Tensor) -> None:
        """Let the observer see ``x``, a float tensor, whatever the switches are; parameters keep their values.

        Per channel the first tensor gives parameters their length.

        Raises:
            ValueError: per channel or group, the observer's buffers have another length than ``x`` needs.
        """
        if self.qtype.axis is not None:
            self.allocate(self.qtype.granularity.count(x.shape))
        self.activation_post_process(x.detach())

    @torch.no_grad()
    def initialize(self, qparams: QParams | None = None) -> None:
        """Set the parameters from ``qparams``, or from what the observer has seen; no later batch sets them again.

        ``initialized`` becomes 1 and ``begins`` 0.

        Raises:
            ValueError: no qparams given, and the observer has seen no finite value; or per channel the observer's
                buffers have another length than the scale of ``qparams``.
        """
        if qparams is None:
            if not bool(self.activation_post_process.has_observed()):
                raise ValueError(f"the observer of this {type(self).__name__} has seen no finite value")
            qparams = self.activation_post_process.calculate_qparams()
        if self.qtype.axis is not None:
            self.allocate(qparams.scale.numel())
        self._write(qparams)
        self.initialized.fill_(1)
        self.begins.zero_()
        self._beginning = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize ``x`` by the trained parameters; the first training batch sets them before it is rounded.

        That batch sets them only with the observer switched on and a finite value in it. While they are not set, ``x``
        is returned, and a UserWarning says so once. The result has the dtype of ``x``; in eval mode under autocast
        bfloat16 and float16 become float32. With rounding switched off it has the values of ``x``.

        Raises:
            NotImplementedError: ``torch.compile`` traces, and the parameters are not known to be set.
            TypeError: ``x`` is no float tensor.
        """
        check_float_tensor("x", x)
        if torch.compiler.is_compiling() and not self._qparams_known:
            raise NotImplementedError(
                f"torch.compile can't set the parameters of a {type(self).__name__}: run the model once on a batch, or "
                "call initialize(), before it is compiled"
            )
        if self.training:
            join_ranks()
        waits = self.training and (self._beginning is not None or not self.has_qparams())
        may_observe = not torch.compiler.is_compiling() and not is_recomputing()
        may_observe = may_observe and tells_range(x, self.activation_post_process)
        may_observe = may_observe and waits and bool(self.observer_enabled)
        if may_observe and (self.begins_with_next_batch() or not self.has_qparams()):
            self._initialize_from_batch(x.detach())
        if not self.has_qparams():
            warn_once(
                self,
                f"a {type(self).__name__} without parameters passes its input through; run it in training mode "
                "with its observer enabled, call initialize(), or load a checkpoint",
                stacklevel=3,
            )
            return x
        return self._rounded(x if self.training else to_hold_codes(x, self.qtype, self))

    def _initialize_from_batch(self, x: Tensor) -> None:
        """Initialize the parameters from the first training batch; a batch without a finite value changes nothing."""
        self.observe(x)
        if bool(self.activation_post_process.has_observed()):
            self.initialize()

    def _top(self, qparams: QParams) -> Tensor:
        """Return the largest value of the grid that ``qparams`` give, at least one step above zero.

        It is ``scale · max(quant_max - zero_point, 1)``. Schemes whose grids begin at zero take their first scale or
        bound from it. A zero point above the smallest code means that values below zero were seen, which such a scheme
        sets to 0: that is warned of (UserWarning).
        """
        if bool((qparams.zero_point > self.qtype.quant_min).any()):
            lowest = float((qparams.scale * (self.qtype.quant_min - qparams.zero_point)).min())
            warnings.warn(
                f"a {type(self).__name__} of {self.qtype} sets what is below zero to 0, and its values go down to "
                f"{lowest:.3g}: use it behind a ReLU, and a signed type elsewhere",
                stacklevel=4,
            )
        return qparams.scale * (self.qtype.quant_max - qparams.zero_point).clamp(min=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedFakeQuantize:
        """Apply ``fn`` (a move or cast) to all tensors, but keep parameters in float32 in a model of any dtype."""
        before = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != old.dtype:
                parameter.data = old.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; if the number of channels was unknown, take it from there.

        Forget whether parameters are set.
        """
        for name in self._parameters:
            saved = state_dict.get(prefix + name)
            if self.qtype.axis is not None and self._channels == 0 and isinstance(saved, Tensor) and saved.numel():
                self.allocate(saved.numel())
        self._qparams_known = False
        self._beginning = None
        self.begins.zero_()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return text for ``repr``: the type, then ``"initialized=False, fake_quant=True, observer=True"``."""
        return (
            f"{self.qtype}, initialized={bool(self.initialized)}, fake_quant={bool(self.fake_quant_enabled)}, "
            f"observer={bool(self.observer_enabled)}"
        )


def floored(parameter: Tensor, floor: float) -> Tensor:
    """Return ``max(parameter, floor)``, elementwise.

    The gradient is 1 everywhere, also below the floor, so that an optimizer can lift the parameter again.
    """
    fixed = parameter.detach()
    return fixed.clamp(min=floor) + (parameter - fixed)
