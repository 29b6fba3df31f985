"""The codes that `verify` compares, and the functions that run a model and return them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

# A quantizer's codes minus zero points, one tensor per call, by its name in the model.
Codes: TypeAlias = dict[str, list[Tensor]]
# The same, to be used in the place of those that a model makes; None: its own.
GivenCodes: TypeAlias = Mapping[str, Sequence[Tensor | None]]


class Runner(Protocol):
    """A function that runs a deployed or trained model on arguments, and returns ``(codes, outputs)``.

    It is called with positional arguments as a tuple, named ones as a dict, and the codes to use in place of those that
    the model makes, or None. Codes are a dict from a quantizer's name to a list with one tensor per call: its codes
    minus zero point, as float32 on the CPU. Outputs are a list of the tensors of the result, on the CPU.
    """

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: GivenCodes | None = None
    ) -> tuple[Codes, list[Tensor]]:
        """Return ``(codes, outputs)`` of one call.

        ``codes`` has for each quantizer, by name, a list with one tensor of codes minus zero points per call.
        ``outputs`` are the tensors of the result, on the CPU.

        Args:
            args: positional arguments.
            kwargs: named arguments.
            given: codes to use in place of those that quantizers make, by quantizer and call, so that each layer
                computes on given codes; None: the model's own.
        """


def take_given(given: GivenCodes, codes: Codes, name: str, own: Tensor) -> Tensor | None:
    """Append the codes that a quantizer made to ``codes``; return the codes that its readers should get instead.

    Args:
        given: codes to use: by the quantizer's name a sequence with one entry per call, None for a call that keeps its
            own. A name or an entry at the end may be missing, which means the same.
        codes: what was recorded so far: by the quantizer's name a list with one entry per call; changed in place. The
            number of its entries under ``name``, before ``own`` is appended, is the index of this call.
        name: of the quantizer.
        own: the codes that it made, minus zero point.

    Returns:
        The given codes for this call; None if the readers get ``own``: none are given, or they equal ``own``.
    """
    calls = codes.setdefault(name, [])
    calls.append(own)
    others = given.get(name, ())
    other = others[len(calls) - 1] if len(calls) <= len(others) else None
    return None if other is None or torch.equal(other, own) else other
