"""The module that observes a tensor and rounds it to the grid that the observations give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritonq.code_precision import to_hold_codes
from tritonq.factory import Factory, make_observer
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.recomputation import is_recomputing
from tritonq.functional.saved_input import mark_on_grid
from tritonq.granularity import describe_granularity, describe_span
from tritonq.grid import Grid
from tritonq.observers import MinMaxObserver, MovingAverageMinMaxObserver, ObserverBase, PassiveObserver, RangeObserver
from tritonq.outliers import tell_outlier, tells_range
from tritonq.qparams import QParams
from tritonq.rank_ranges import FollowingGrid, RankState, join_ranks
from tritonq.warn_once import warn_once

# Averages of scales and of the ranges that they follow from differ by rounding errors.
_AVERAGING_ERROR = 1e-3


class FakeQuantize(FakeQuantizeBase):
    """Observe in training, then fake quantize: ``(clamp(round(x/s) + z, qmin, qmax) - z) * s``.

    Constructor, switches (``observer_enabled``, ``fake_quant_enabled``) and buffer names are torch.ao's. What differs:
    nothing is observed in eval mode; until something was observed, values pass through, with one warning; buffers have
    their final shape from construction when ``num_channels`` is given (the modules of ``tritonq.nn`` give it); with a
    min-max observer, training waits for the device only until something was observed.

    Args:
        observer: observer class or factory.
        quant_min: smallest code; needs ``quant_max``; None takes the dtype's range.
        quant_max: largest code; needs ``quant_min``.
        is_dynamic: only False is supported.
        **observer_kwargs: arguments of the observer, such as dtype and rule, which :class:`ObserverBase` describes.

    Attributes:
        activation_post_process: the observer.
        scale: float32 buffer, (1,), (channels,) or (groups of all channels,); (0,) while their number is unknown.
        zero_point: int32 buffer, as ``scale``.
        begins: uint8 buffer (1,), in no state dict: 1 while scale and range are those of the example inputs of
            ``prepare_qat``, which the first training batch replaces.

    Raises:
        TypeError: an observer that is not tritonq's, an argument that it doesn't have, or a code or axis that is no
            integer.
        ValueError: the observer refuses its arguments, such as an unknown dtype, a half-given code range, or
            ``is_dynamic=True``.

    Source: torch.ao.quantization.FakeQuantize; docs/numbers.md, "Fake quantization".

    Examples:
        >>> quantizer = FakeQuantize(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-4, quant_max=4)
        >>> quantizer(torch.tensor([-2.0, 0.3, 0.9]))
        tensor([-2.0000,  0.5000,  1.0000])
    """

    begins: Tensor

    def __init__(
        self,
        observer: type[ObserverBase] | Factory[ObserverBase] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None or quant_max is not None:
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        self.activation_post_process = make_observer(observer, is_dynamic=is_dynamic, **observer_kwargs)
        self.qtype = self.activation_post_process.qtype
        # Per channel the length may come later, from the first tensor or a checkpoint.
        shape = (1,) if self.qtype.axis is None else (self.activation_post_process.num_channels or 0,)
        self.register_buffer("begins", torch.zeros(1, dtype=torch.uint8), persistent=False)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", self._initial_zero_point(shape))
        self._revision = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled module; one of version 0.1.0 lacks the flag ``begins``, which is added."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "begins" not in self._buffers:
            self.register_buffer("begins", torch.zeros_like(self.fake_quant_enabled), persistent=False)

    def _initial_zero_point(self, shape: tuple[int, ...]) -> Tensor:
        smallest = max(self.activation_post_process.fixed_zero_point or 0, self.qtype.quant_min)
        return torch.full(shape, smallest, dtype=torch.int32)

    def allocate(self, num_channels: int) -> None:
        """Give scale, zero point and the observer's buffers one element per scale of the tensor, in place.

        The scale becomes 1, and the zero point the one that type and rule fix (128 for symmetric ``torch.quint8``),
        else 0, or the smallest code if that is larger. Nothing is done if there is one scale for the tensor, or if the
        buffers have this length.

        Args:
            num_channels: number of scales: channels, or all groups of all channels.

        Raises:
            ValueError: the observer has another number of ranges (a PassiveObserver: of scales) already.
        """
        self.activation_post_process.allocate(num_channels)
        if self.qtype.axis is not None and self.scale.numel() != num_channels:
            # The same objects, which others may hold: DDP lists buffers, nn.DataParallel copies from them.
            self.scale.resize_(num_channels).fill_(1)
            self.zero_point.resize_(num_channels).copy_(self._initial_zero_point((num_channels,)))

    _magnitude: float = -math.inf  # see tell_outlier
    # Addresses and versions of range, scale and zero point when they were last compared.
    _averages_read: tuple[tuple[int, int], ...] | None = None

    def rests_on_data(self) -> Tensor:
        """Return a 0-d bool tensor on the device: whether the observer has seen values, in any channel.

        Values seen before a loaded state dict was saved count; so does a scale set in a PassiveObserver.
        """
        return self.activation_post_process.has_observed()

    @torch.no_grad()
    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Take scale, zero point and range from a run on example inputs, until the first training batch replaces them.

        So a model has finite ranges from the start, which averages of models (EMA, SWA) can hold.

        Args:
            state: the quantizer's buffers after that run by name, such as ``"activation_post_process.min_val"``, which
                are copied. It must have ``"scale"``; a buffer that is not in it stays. Leave the switches out: they
                would be copied too.

        Raises:
            ValueError: the quantizer has another number of scales already.
        """
        self.allocate(state["scale"].numel())
        for name, buffer in self.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        self._beginning = self._scale_on_host()
        self.begins.fill_(1)
        self._qparams_known = False

    def begin_anew(self) -> None:
        """Forget the range that ``prepare_qat`` took from example inputs, before the first training batch is observed.

        The range becomes empty; scale and zero point stay. :meth:`observe` calls it for each batch. Once training has
        begun, or while the observer is off, it forgets nothing. Each call also does two other things:

        - It warns (UserWarning), once per observer, if the largest magnitude of a min-max observer's range for the
          whole tensor is more than a hundred times that of the call before. On a GPU some of the ranges are compared,
          in later calls. Nothing is compared while ``torch.compile`` traces.
        - It tells the DistributedDataParallel whose forward is running, if there is one, to merge the ranges of its
          ranks after each forward. The call itself does not communicate.
        """
        join_ranks()
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._magnitude = tell_outlier(self.activation_post_process, self._magnitude)
        if compiling or self._beginning is not None:
            self._forget_beginning(compiling)

    @torch.no_grad()
    def _forget_beginning(self, compiling: bool) -> None:
        observer = self.activation_post_process
        if compiling or (self.scale.is_cuda and torch.cuda.is_current_stream_capturing()):
            # The flag, not the attribute, on which a graph would depend: it would be traced anew after its first step.
            now = (self.begins != 0) & (self.observer_enabled != 0)
            if isinstance(observer, RangeObserver):
                observer.reset_where(now.view(()))
            self.begins.copy_(torch.where(now, 0, self.begins))
            return
        if not bool(self.observer_enabled):
            return
        if bool(self.begins):
            if isinstance(observer, RangeObserver):
                observer.reset_min_max_vals()
            self._qparams_known, self._magnitude = False, -math.inf
            self.begins.zero_()
        self._beginning = None

    def rank_state(self) -> RankState:
        """Return the buffers that all ranks are to share; :func:`merge_ranges` merges them, and nothing is sent here.

        - A RangeObserver with a process group, which shares already: an empty :class:`RankState`.
        - Else a MinMaxObserver: its minimum, of which all ranks take the smallest, its maximum, of which they take the
          largest, and the quantizer's scale and zero point, which follow from both.
        - Any other: scale and zero point, of which all ranks take the first rank's. Histograms are not shared here;
          :func:`tritonq.sync_observers` adds their counts up.
        """
        observer = self.activation_post_process
        if isinstance(observer, RangeObserver) and observer.process_group.process_group is not None:
            return RankState()
        if isinstance(observer, MinMaxObserver):
            grid = FollowingGrid(self.scale, self.zero_point, self.qtype, observer.rule, observer.eps)
            return RankState([observer.min_val], [observer.max_val], grid=grid)
        return RankState(first=[self.scale, self.zero_point])

    def has_qparams(self) -> bool:
        """Whether scale and zero point rest on data: something was observed or loaded, or set in a PassiveObserver.

        A scale or zero point that was set in a PassiveObserver since the last call is taken over first.
        """
        self._take_given_qparams()
        return super().has_qparams()

    def enabled_on_device(self) -> Tensor:
        """Return a uint8 tensor (1,) on the device: 1 if :meth:`forward` rounds.

        A scale or zero point that was set in a PassiveObserver is taken over first.
        """
        self._take_given_qparams()
        return super().enabled_on_device()

    def _take_given_qparams(self) -> None:
        """Take over scale and zero point that a PassiveObserver was given since the last call."""
        observer = self.activation_post_process
        if isinstance(observer, PassiveObserver) and observer.revision != self._revision:
            self._revision, self._qparams_known = observer.revision, False
            self.allocate(observer.scale.numel())
            self.refresh_qparams()

    def forward(self, x: Tensor, observe: bool = True) -> Tensor:
        """Observe ``x`` (training only) and fake quantize it; the result has the same shape and memory format.

        The dtype is that of ``x``; in eval mode under autocast bfloat16 and float16 become float32. In eval mode
        without autocast a UserWarning says once if the dtype can't hold all codes apart. Until something was observed
        the values are those of ``x``, and a UserWarning says so once. Pass ``observe=False``, with which the range
        stays as it is, where another call of this quantizer observes the same tensor.

        Raises:
            TypeError: ``x`` is observed and no float tensor.
            ValueError: ``x`` is observed and has another number of channels than the range.
        """
        if not self.training:
            x = to_hold_codes(x, self.qtype, self)
        elif observe:
            self.observe_in_training(x)
        return self.quantize(x)

    def observe_in_training(self, x: Tensor) -> None:
        """Call :meth:`observe` with ``x`` in training mode.

        Nothing is done in eval mode, if activation checkpointing runs the forward again, or if ``x`` is empty and the
        observer has no process group. While ``torch.compile`` traces, an empty ``x`` is observed like any other.
        """
        if self.training and not is_recomputing() and tells_range(x, self.activation_post_process):
            self.observe(x)

    def observe(self, x: Tensor) -> None:
        """Update range, scale and zero point from ``x`` in place, in any mode, unless ``observer_enabled`` is 0.

        The range of example inputs is forgotten first, see :meth:`begin_anew`. Per-channel buffers that have no length
        yet get that of ``x``, also with the observer off. A PassiveObserver takes nothing from ``x``.

        Raises:
            TypeError: ``x`` is no float tensor.
            ValueError: ``x`` has another number of channels than the range, lacks their axis, or the axis is no
                multiple of the groups.
            RuntimeError: the observer's process group is wanted, and torch.distributed is not initialised.
        """
        observer = self.activation_post_process
        if self.qtype.axis is not None and self.scale.numel() == 0:
            self.allocate(self.qtype.granularity.count(x.shape))
        self.begin_anew()
        if isinstance(observer, RangeObserver):
            observer.observe(x, QParams(self.scale, self.zero_point), self.observer_enabled)
        elif not isinstance(observer, PassiveObserver) and bool(self.observer_enabled):
            observer(x.detach())
            self.refresh_qparams()

    def calculate_qparams(self) -> QParams:
        """Return the buffers ``scale`` and ``zero_point`` themselves, as :meth:`forward` and deployment use them.

        If the observer is a PassiveObserver that was given others, they are taken over first. In eval mode of an
        averaged model (EMA), a zero point that does not follow from the averaged range is corrected first, and the
        scale with it, in place; not if the scale was set by hand.
        """
        self._take_given_qparams()
        self._follow_average()
        return super().calculate_qparams()

    def _follow_average(self) -> None:
        """In eval mode, take scale and zero point from the range, if an average of models (EMA) changed the range.

        Averages of models leave integers out, and with them the zero point. A scale that was set by hand stays: it is
        far from what the range gives.
        """
        observer = self.activation_post_process
        if self.training or torch.compiler.is_compiling() or not isinstance(observer, MinMaxObserver):
            return
        with torch.no_grad():
            self._take_average(observer)

    def _take_average(self, observer: MinMaxObserver) -> None:
        held = (self.scale, self.zero_point, observer.min_val, observer.max_val)
        if any(tensor.is_inference() for tensor in held):
            return
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in held)
        if versions == self._averages_read:
            return
        scale, zero_point = (value.view_as(self.scale) for value in observer.calculate_qparams())
        # A scale that does not follow from the range was set by hand, and stays.
        follows = bool(observer.has_observed()) and torch.allclose(scale, self.scale, rtol=_AVERAGING_ERROR, atol=0.0)
        if follows and not torch.equal(zero_point, self.zero_point):
            self.refresh_qparams()
        self._averages_read = tuple((tensor.data_ptr(), tensor._version) for tensor in held)

    def refresh_qparams(self) -> None:
        """Overwrite scale and zero point in place with those that the observer's ``calculate_qparams`` returns.

        Until a RangeObserver has seen a value the scale becomes 1.
        """
        scale, zero_point = self.activation_post_process.calculate_qparams()
        self.scale.copy_(scale.view_as(self.scale))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))

    def quantize(self, x: Tensor) -> Tensor:
        """Fake quantize ``x``, a float tensor, with the buffers ``scale`` and ``zero_point``; nothing is observed.

        The result has the shape and dtype of ``x``. While ``fake_quant_enabled`` is 0 it has the values of ``x``. If
        nothing was observed yet it is ``x`` itself, and a UserWarning says so once.
        """
        grid = self.grid_or_warning()
        if grid is None:
            return x
        y = fake_quantize(x, grid)
        if self.qtype.axis is None:
            mark_on_grid(y, self.scale, grid)
        return y

    def grid_or_warning(self) -> Grid | None:
        """Return the grid that :meth:`forward` rounds to, with its switch; None if nothing was observed yet.

        With None a UserWarning says so once. The grid holds the buffers themselves, with the switch 0 while rounding is
        off, and the zero point None if it is always 0. While ``torch.compile`` traces, a grid is returned in any case,
        with the switch 0 if nothing was observed. At all other times scale and zero point are first corrected as
        :meth:`calculate_qparams` does.
        """
        if torch.compiler.is_compiling():
            active = self.enabled_on_device()
        elif self.has_qparams():
            self._follow_average()
            active = self.fake_quant_enabled
        else:
            self.warn_unobserved()
            return None
        zero_point = None if self.activation_post_process.zero_point_is_zero else self.zero_point
        return Grid(self.scale, zero_point, self.qtype, active)

    def warn_unobserved(self) -> None:
        """Warn (UserWarning), the first time, that values pass unrounded because nothing was observed."""
        warn_once(
            self,
            "a FakeQuantize that has observed nothing passes its input through; run it in training mode with its "
            "observer enabled, or load a checkpoint",
            stacklevel=4,
        )

    def extra_repr(self) -> str:
        """Return grid and switches as text, for ``repr``.

        Such as ``"codes 0..255, affine per tensor, scale=1, zero_point=0, fake_quant=on, observer=on"``.
        """
        on = ("off", "on")
        return (
            f"codes {self.quant_min}..{self.quant_max}, {'symmetric' if self.qtype.symmetric else 'affine'} "
            f"per {describe_granularity(self.qtype.granularity)}, scale={describe_span(self.scale)}, "
            f"zero_point={describe_span(self.zero_point)}, fake_quant={on[int(self.fake_quant_enabled)]}, "
            f"observer={on[int(self.observer_enabled)]}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; if the number of channels was unknown, take it from there.

        Reset what is remembered of the scale.
        """
        saved = state_dict.get(prefix + "scale")
        if self.qtype.axis is not None and self.scale.numel() == 0 and isinstance(saved, Tensor) and saved.numel():
            self.allocate(saved.numel())
        self._qparams_known, self._beginning = False, None
        self.begins.zero_()
        super()._load_from_state_dict(state_dict, prefix, *args)
