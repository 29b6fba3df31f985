"""What `verify` compares, whatever runs the deployed model."""

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
    """Runs a model on positional and named arguments."""

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: GivenCodes | None = None
    ) -> tuple[Codes, list[Tensor]]:
        """Return the codes that it makes, and its outputs.

        Args:
            args: positional arguments.
            kwargs: named arguments.
            given: what readers of each quantizer's codes are given instead, so that each layer computes on these.
        """


def take_given(given: GivenCodes, codes: Codes, name: str, own: Tensor) -> Tensor | None:
    """Keep the codes that a quantizer made; return what its readers should get instead, or None for its own."""
    calls = codes.setdefault(name, [])
    calls.append(own)
    others = given.get(name, ())
    other = others[len(calls) - 1] if len(calls) <= len(others) else None
    return None if other is None or torch.equal(other, own) else other
