"""What `verify` compares, whatever runs the deployed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

# A quantizer's codes minus zero points, one tensor per call, by its name in the model.
Codes: TypeAlias = dict[str, list[Tensor]]
# Runs a model on positional and named arguments; returns its codes and its outputs.
Runner: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Codes, list[Tensor]]]
