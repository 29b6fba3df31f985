"""The base class of fake quantizers to integers: switches, scale and zero point.

Scale and zero point *rest on data* once a tensor was observed, they were loaded, or they were set. Before that a
quantizer passes values unrounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.grid import Grid
from tritonq.observers import ObserverBase
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType, WithQuantizedType
from tritonq.saved_grid import SavesGrid
from tritonq.switched_quantizer import SwitchedQuantizer


class FakeQuantizeBase(WithQuantizedType, SavesGrid, SwitchedQuantizer):
    """Base class of fake quantizers to integers, with their switches, scale and zero point.

    Attributes:
        scale: float32, (1,), (channels,) or (groups of all channels,), or (0,) while their number is unknown; a buffer,
            or a parameter if it is trained.
        zero_point: int32 buffer of that shape, or a float32 parameter if it is trained.
    """

    scale: Tensor
    zero_point: Tensor
    # 1 while scale and range are those of example inputs; of quantizers with `begin_with`.
    begins: Tensor
    qtype: QuantizedType
    # Axis of the input that counts samples; None for weights. Layers set it for the quantizers of their weights.
    batch_axis: int | None = 0
    is_dynamic = False
    # Whether the code of a value is the one nearest to it; else the module alone says which it is.
    rounds_to_nearest = True
    library_bases = (
        ("torch.ao.quantization.fake_quantize", "FakeQuantizeBase"),
        ("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase"),
    )
    # The scale that the example inputs of `prepare_qat` gave, until a training batch replaces it; then None.
    _beginning: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        # Whether the qparams are known to rest on data.
        self._qparams_known = False
        # Address and version of the switch when it was last read, and what it was.
        self._switch_read: tuple[tuple[int, int], bool] | None = None

    def rests_on_data(self) -> Tensor:
        """Return one element on the device, bool or uint8: whether scale and zero point *rest on data*.

        They do once values were observed, or once they were loaded or set. Until then values pass through unrounded.
        Nothing may be read back from the device here.

        Raises:
            NotImplementedError: a subclass must define it.
        """
        raise NotImplementedError(f"a {type(self).__name__} does not say in a tensor whether it has qparams")

    def has_qparams(self) -> bool:
        """Whether scale and zero point *rest on data*, so that values can be rounded.

        Each call reads the device until that is true; then it is remembered, until for example a state dict is loaded
        or :meth:`FakeQuantize.begin_anew` empties the range.
        """
        if not self._qparams_known:
            self._qparams_known = bool(self.rests_on_data())
        return self._qparams_known

    def is_enabled_on_host(self) -> bool:
        """Whether :meth:`forward` rounds: it is switched on, and :meth:`has_qparams` is True.

        Synchronises with the device only after ``fake_quant_enabled`` was changed, or while ``has_qparams`` reads it.
        """
        return self.is_switched_on_host() and self.has_qparams()

    def enabled_on_device(self) -> Tensor:
        """Return a uint8 tensor (1,) on the device: 1 if :meth:`forward` rounds.

        It rounds if it is switched on and its scale rests on data. The switch is not read on the host; whether the
        scale rests on data is, by :meth:`has_qparams`, but not while ``torch.compile`` traces. The tensor may be the
        buffer ``fake_quant_enabled`` itself: don't change it.
        """
        known = self._qparams_known if torch.compiler.is_compiling() else self.has_qparams()
        return self.fake_quant_enabled if known else self.fake_quant_enabled * self.rests_on_data()

    def rests_on_examples(self) -> bool:
        """Whether scale and zero point are still those that the example inputs of ``prepare_qat`` gave.

        False if no run on example inputs gave them, or once a training batch or a loaded state replaced them. The host
        waits for the scale, and compares it with a copy of what the example inputs gave; the zero point is not read.
        """
        return self._beginning is not None and torch.equal(self._beginning, self._scale_on_host())

    def _scale_on_host(self) -> Tensor:
        """Return a copy of the attribute ``scale`` on the host, by which :meth:`rests_on_examples` compares."""
        return self.scale.detach().cpu().clone()

    def begins_with_next_batch(self) -> bool:
        """Whether the next training batch replaces the scale that the example inputs of ``prepare_qat`` gave.

        False if no run on example inputs gave it, or once a batch or a loaded state replaced it. Until then the device
        is read.
        """
        if self._beginning is not None and not bool(self.begins):
            # A compiled or captured step clears the buffer alone.
            self._beginning = None
        return self._beginning is not None

    def is_active(self) -> bool:
        """Return whether :meth:`forward` rounds: the older name of :meth:`is_enabled_on_host`."""
        return self.is_enabled_on_host()

    def active_switch(self) -> Tensor:
        """Return a uint8 tensor (1,), 1 if :meth:`forward` rounds: the older name of :meth:`enabled_on_device`."""
        return self.enabled_on_device()

    def grid(self) -> Grid:
        """Return the grid that :meth:`forward` rounds to, with its switch on the device; nothing is observed.

        Scale and zero point are those of :meth:`calculate_qparams`, not copies; the zero point is None if it is always
        0. The switch is that of :meth:`enabled_on_device`: 0 also while the scale doesn't rest on data.
        """
        scale, zero_point = self.calculate_qparams()
        observer = getattr(self, "activation_post_process", None)
        is_zero = isinstance(observer, ObserverBase) and observer.zero_point_is_zero
        return Grid(scale, None if is_zero else zero_point, self.qtype, self.enabled_on_device())

    def is_switched_on_host(self) -> bool:
        """Return the buffer ``fake_quant_enabled`` as a bool; a GPU is read once for each change of the buffer."""
        switch = self.fake_quant_enabled
        if switch.is_cpu or switch.is_inference():
            return bool(switch)
        version = (switch.data_ptr(), switch._version)
        if self._switch_read is None or self._switch_read[0] != version:
            self._switch_read = (version, bool(switch))
        return self._switch_read[1]

    def calculate_qparams(self) -> QParams:
        """Return the scale and zero point with which :meth:`forward` rounds, and which deployment takes.

        Here they are the attributes ``scale`` and ``zero_point`` themselves; subclasses may return new tensors.
        """
        return QParams(self.scale, self.zero_point)

    # What torch.ao and torchao ask of a quantizer when they convert a model.

    @property
    def dtype(self) -> torch.dtype | QuantizedType | str:
        """The torch dtype that the observer was given, or else the one that fits the codes, such as ``torch.qint8``.

        If none fits, it is the QuantizedType, or its name, that the observer was given; without an observer ``qtype``.
        """
        observer = getattr(self, "activation_post_process", None)
        return observer.dtype if isinstance(observer, ObserverBase) else self.qtype.torch_dtype or self.qtype

    @property
    def is_per_channel(self) -> bool:
        """Whether there is one scale per channel or per group."""
        return self.qtype.axis is not None
