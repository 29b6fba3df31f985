"""The base class of all fake quantizers: two switches, for rounding and for observing."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.factory import WithArgs
from tritonq.observers.base import FixedDtypeBuffers
from tritonq.rank_ranges import SharesRange


class SwitchedQuantizer(WithArgs, FixedDtypeBuffers, SharesRange):
    """A fake quantizer whose rounding and observation can be switched off, on the device.

    Attributes:
        fake_quant_enabled: uint8 buffer (1,), 1 at first; while it is 0, values pass unrounded.
        observer_enabled: uint8 buffer (1,), 1 at first; while it is 0, batches do not change the range.
    """

    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch rounding on, or off with ``enabled=False``."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Switch rounding off: values pass as they are."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on, or off with ``enabled=False``."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        """Switch observation off: batches no longer change the range."""
        self.enable_observer(False)
