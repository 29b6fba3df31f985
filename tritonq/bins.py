"""Histogram bins that never move: the top bits of a float."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tritonq.arithmetic import whole_number

_EXPONENT_BIAS = 127
_FLOAT_MANTISSA = 23
MAX_MANTISSA_BITS = 8
# 64 octaves on each side of zero.
_MIN_EXPONENT, _MAX_EXPONENT = -32, 32
_LOG2_OCTAVES = 7


@dataclass(frozen=True)
class FloatPrefixBins:
    """A value's bin is its sign, its exponent and the top bits of its mantissa: a bit cast and a shift.

    Bins ascend by value: ``per_side`` negative ones from ``-2^max_exponent`` up, one bin for zero and every
    ``|x| < 2^min_exponent``, and ``per_side`` positive ones. Finite values of magnitude ``2^max_exponent`` or more
    count in the outermost bin of their sign; NaN and infinities have no bin. A positive edge belongs to the bin above
    it, a negative one to the bin below it.

    Attributes:
        mantissa_bits: each octave (2^e to 2^(e+1)) is cut into ``2^mantissa_bits`` bins of equal width; 0..8.
        min_exponent: exponent of the smallest value that is told from zero.
        max_exponent: exponent at which the bins end.

    Raises:
        ValueError: mantissa bits out of range, ``min_exponent`` not below ``max_exponent``, or one of these outside
            -126..128, float32's exponents.

    Source: docs/numbers.md, "Histograms".

    Examples:
        >>> bins = FloatPrefixBins(mantissa_bits=1, min_exponent=0, max_exponent=2)
        >>> bins.edges("cpu").tolist()
        [-4.0, -3.0, -2.0, -1.5, -1.0, 1.0, 1.5, 2.0, 3.0, 4.0]
    """

    mantissa_bits: int = 4
    min_exponent: int = _MIN_EXPONENT
    max_exponent: int = _MAX_EXPONENT

    def __post_init__(self) -> None:
        if not isinstance(self.mantissa_bits, int) or not 0 <= self.mantissa_bits <= MAX_MANTISSA_BITS:
            raise ValueError(f"mantissa_bits must be an int in 0..{MAX_MANTISSA_BITS}, got {self.mantissa_bits!r}")
        if not -_EXPONENT_BIAS < self.min_exponent < self.max_exponent <= _EXPONENT_BIAS + 1:
            raise ValueError(
                f"exponents must ascend within {1 - _EXPONENT_BIAS}..{_EXPONENT_BIAS + 1}, "
                f"got {self.min_exponent}..{self.max_exponent}"
            )

    @classmethod
    def of_size(cls, bins: int) -> FloatPrefixBins:
        """Return bins with ``bins / 2`` of them on each side of zero; 2048 gives four mantissa bits.

        The one at zero comes on top, so that :attr:`count` is ``bins + 1``. Magnitudes reach from 2^-32 to 2^32.

        Raises:
            ValueError: ``bins`` is not a power of two in 128..32768.
        """
        whole = whole_number(bins)
        mantissa_bits = -1 if whole is None else whole.bit_length() - 1 - _LOG2_OCTAVES
        if bins != 1 << max(0, mantissa_bits + _LOG2_OCTAVES) or not 0 <= mantissa_bits <= MAX_MANTISSA_BITS:
            low, high = 1 << _LOG2_OCTAVES, 1 << (_LOG2_OCTAVES + MAX_MANTISSA_BITS)
            raise ValueError(f"bins must be a power of two in {low}..{high}, got {bins!r}")
        return cls(mantissa_bits)

    @property
    def per_side(self) -> int:
        """Number of bins on each side of zero."""
        return (self.max_exponent - self.min_exponent) << self.mantissa_bits

    @property
    def count(self) -> int:
        """Number of bins in all: ``2 * per_side + 1``."""
        return 2 * self.per_side + 1

    @property
    def shift(self) -> int:
        """Number of low bits of a float32 that are dropped to find its bin: ``23 - mantissa_bits``."""
        return _FLOAT_MANTISSA - self.mantissa_bits

    @property
    def first_prefix(self) -> int:
        """The upper bits of ``2^min_exponent``, the lower edge of the innermost positive bin, as an integer.

        These are its float32 bits shifted right by :attr:`shift`.
        """
        return (self.min_exponent + _EXPONENT_BIAS) << self.mantissa_bits

    def edges(self, device: torch.device | str) -> Tensor:
        """Return the edges of all bins on ``device``, ascending: float64 (count + 1,).

        Calls with equal bins and the same device share the tensor: do not write to it.
        """
        return _edges(self, torch.device(device))


@lru_cache(maxsize=64)
def _edges(bins: FloatPrefixBins, device: torch.device) -> Tensor:
    steps = torch.arange(bins.per_side + 1, dtype=torch.float64, device=device)
    per_octave = 1 << bins.mantissa_bits
    octave = torch.div(steps, per_octave, rounding_mode="floor")
    side = torch.ldexp(1 + (steps - octave * per_octave) / per_octave, octave + bins.min_exponent)
    return torch.cat((-side.flip(0), side))
