"""The check that a prepared model computes what the float model did."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.prepare.record.example import Recording
from tritonq.prepare.record.snapshot import ModelSnapshot, preserved_random_state
from tritonq.prepare.record.structure import clone_tensors, tensors_in

# A prepared model with rounding off computes what the float model did, up to the rounding of folded BatchNorms; far
# more than that means that something else changed. Relative to the largest output.
_SAME_OUTPUT = {torch.float16: 0.1, torch.bfloat16: 0.3}
_SAME_OUTPUT_DEFAULT = 1e-3


def check_same_output(model: nn.Module, recording: Recording) -> None:
    """Run the prepared model once with rounding off and compare with what the float model returned.

    Raises:
        RuntimeError: they differ by more than rounding errors.
    """
    snapshot = ModelSnapshot(model)
    try:
        with preserved_random_state(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantizers that have observed nothing say so
            for module in model.modules():
                module.training = False
                if isinstance(module, FakeQuantizeBase):
                    module.disable_fake_quant()
            args, kwargs = clone_tensors(recording.args, recording.kwargs)
            result = model(*args, **kwargs)
    finally:
        snapshot.restore()
    differing = list(_differences(tensors_in(recording.result), tensors_in(result)))
    if differing:
        raise RuntimeError(
            f"the prepared {type(model).__name__} would not compute what the float model does ({differing[0]}); the "
            "model is as it was. Please report this model; a qconfig of None on its parts narrows the cause down"
        )


def _differences(expected: Iterable[Any], got: Iterable[Any]) -> Iterable[str]:
    wanted, found = dict(expected), dict(got)
    if list(wanted) != list(found):
        yield f"outputs {list(found)} instead of {list(wanted)}"
        return
    for path, tensor in wanted.items():
        other = found[path]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            yield f"output {path} is {other.dtype} {tuple(other.shape)}"
        elif tensor.is_floating_point():
            close = torch.isclose(other.double(), tensor.double(), rtol=0, atol=_tolerance(tensor), equal_nan=True)
            if not bool(close.all()):
                yield f"output {path} differs by {float((other - tensor).abs().max()):.3g}"


def _tolerance(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return _SAME_OUTPUT.get(tensor.dtype, _SAME_OUTPUT_DEFAULT) * largest + torch.finfo(tensor.dtype).tiny
