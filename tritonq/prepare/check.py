"""Check that a prepared model computes what the float model did, and let quantizers begin with observed ranges."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.fake_quantize import FakeQuantize
from tritonq.learned_base import LearnedFakeQuantize
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.observers import RangeObserver
from tritonq.prepare.record.closures import error_text
from tritonq.prepare.record.example import Run
from tritonq.prepare.record.recorder import SEED
from tritonq.prepare.record.snapshot import ModelSnapshot, preserved_random_state
from tritonq.prepare.record.structure import clone_tensors, replace_tensors, tensors_in
from tritonq.process_group import GroupReference
from tritonq.switched_quantizer import SwitchedQuantizer

# A prepared model with rounding off computes what the float model did, up to the rounding of folded BatchNorms; far
# more than that means that something else changed. Relative to the largest output.
_SAME_OUTPUT = {torch.float16: 0.1, torch.bfloat16: 0.3}
_SAME_OUTPUT_DEFAULT = 1e-3
# Deep networks, and BatchNorms over few values, multiply rounding errors. Where the prepared model in float32 is as far
# from itself in float64, up to this factor, the float model may be that far from it too; up to this share of the
# largest output.
_NOISE_FACTOR, _LARGEST_NOISE = 4.0, 0.05
# Where layers and quantizers hold quantizers and observers.
_PLACES = ("weight_fake_quant", "activation_post_process")
# Buffers of a quantizer that say what it does, not what it saw.
_SWITCHES = ("fake_quant_enabled", "observer_enabled")


Ranges = dict[FakeQuantize | LearnedFakeQuantize, dict[str, Tensor]]


def check_same_output(model: nn.Module, run: Run) -> None:
    """Repeat a recorded run with the prepared model, rounding off, and compare the result with the recorded one.

    Tensors at the same paths must have equal shapes and dtypes. Those of floats must agree up to 1/1000 of the largest
    element (float16: 1/10, bfloat16: 3/10), or up to the prepared model's own rounding errors: four times the
    difference between its results in float32 and in float64, at most 5 % of the largest element. Other values are not
    compared.

    Args:
        model: the prepared model, left as it is.
        run: a recorded run of the float model.

    Raises:
        RuntimeError: the results differ by more than rounding errors, or the prepared model fails.
    """
    mode = "training" if run.in_training else "eval"
    snapshot = ModelSnapshot(model)
    try:
        with preserved_random_state(model, SEED), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantizers that have observed nothing say so
            _set_modes(model, run)
            args, kwargs = clone_tensors(run.args, run.kwargs)
            result = model(*args, **kwargs)
            differing = next(iter(_differences(tensors_in(run.result), tensors_in(result))), None)
            if differing is not None and _is_noise(model, run, dict(tensors_in(result))):
                differing = None
    except Exception as error:
        differing = error_text(error)
    finally:
        snapshot.restore()
    if differing is not None:
        raise RuntimeError(
            f"the prepared {type(model).__name__} would not compute in {mode} mode what the float model does "
            f"({differing}); the model is as it was. {_advice(model)}"
        )


def _advice(model: nn.Module) -> str:
    """Return the last sentence of the error's message, without a full stop.

    If the model has quantizers of classes of neither tritonq nor torch, it names these and
    ``tritonq.testing.check_quantizer``; else it asks for a report.
    """
    places = (getattr(part, name, None) for part in model.modules() for name in _PLACES)
    kinds = {type(found) for found in places if found is not None}
    own = sorted(kind.__qualname__ for kind in kinds if kind.__module__.partition(".")[0] not in ("tritonq", "torch"))
    if own:
        return f"With rounding off a quantizer passes its input; tritonq.testing.check_quantizer tries {', '.join(own)}"
    return "Please report this model; a qconfig of None on its parts narrows the cause down"


def _is_noise(model: nn.Module, run: Run, result: dict[Any, Tensor]) -> bool:
    """Whether a prepared model differs from the float model about as much as it differs from itself in float64.

    "About" is four times that, and at most 5 % of the largest element. ``result`` holds its outputs in float32 by their
    paths. False if outputs have other paths, shapes or dtypes.
    """
    expected = dict(tensors_in(run.result))
    if list(expected) != list(result) or any(x.dtype != torch.float32 for x in result.values()):
        return False
    if any((x.shape, x.dtype) != (expected[path].shape, expected[path].dtype) for path, x in result.items()):
        return False
    state = {name: x.double() if x.is_floating_point() else x.clone() for name, x in _state(model)}
    args, kwargs = replace_tensors(clone_tensors(run.args, run.kwargs), _doubled)
    with preserved_random_state(model, SEED):
        wide = dict(tensors_in(torch.func.functional_call(model, state, args, kwargs)))
    for path, x in result.items():
        difference, noise = ((x.double() - other).abs().max() for other in (expected[path], wide[path]))
        limit = min(_NOISE_FACTOR * float(noise), _LARGEST_NOISE * float(x.abs().max()))
        if not float(difference) <= max(limit, _tolerance(expected[path])):
            return False
    return True


def _doubled(x: Tensor) -> Tensor:
    """Return a floating-point tensor in float64; any other tensor as it is."""
    return x.double() if x.is_floating_point() else x


def first_ranges(model: nn.Module, runs: Sequence[Run]) -> Ranges:
    """Repeat the last recorded run as training would begin, but without rounding, and return what quantizers observed.

    BatchNorms normalise with the batch, or with their running statistics if the batch is too small. The model is left
    as it is.

    Args:
        model: the prepared model.
        runs: recorded runs of the float model, each with its arguments and modes; only the last is used.

    Returns:
        A dict: its keys are the quantizers (modules of ``model``) that observed something, its values dicts of copies
        of their parameters and buffers by name, with those of the observer, but without ``fake_quant_enabled`` and
        ``observer_enabled``. Empty if the model fails.
    """
    found: Ranges = {}
    learned = [module for module in model.modules() if isinstance(module, LearnedFakeQuantize)]
    unset = {parameter: parameter.detach().clone() for module in learned for parameter in module.parameters()}
    for normalise_batch in (True, False):
        snapshot = ModelSnapshot(model)
        try:
            with preserved_random_state(model, SEED), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _set_training(model, runs[-1], normalise_batch)
                args, kwargs = clone_tensors(runs[-1].args, runs[-1].kwargs)
                model(*args, **kwargs)
                found = _ranges(model)
        except Exception:
            continue
        finally:
            snapshot.restore()
            for parameter, value in unset.items():
                parameter.data.copy_(value)
        break
    return found


def _set_training(model: nn.Module, run: Run, normalise_batch: bool) -> None:
    """Switch the model to training; its quantizers observe and do not round.

    Modules that ran in eval mode in the recorded run stay so. With ``normalise_batch`` False all BatchNorms do.
    """
    model.train(run.in_training)
    # What stands where BatchNorms were would freeze these.
    places = {layer.batch_norm_place.module for layer in model.modules() if isinstance(layer, QATBatchNormLayer)}
    for name, module in model.named_modules():
        if module in places:
            continue
        if (isinstance(module, _BatchNorm) and not normalise_batch) or not run.modes.get(name, True):
            module.training = False
        if isinstance(module, SwitchedQuantizer):
            module.disable_fake_quant()
            module.training = isinstance(module, (FakeQuantize, LearnedFakeQuantize))
        if isinstance(module, RangeObserver):
            module.process_group = GroupReference(None)  # other ranks may prepare no model now


def _ranges(model: nn.Module) -> Ranges:
    """Return the parameters and buffers of each quantizer that has observed something, without its switches."""
    quantizers = [module for module in model.modules() if isinstance(module, (FakeQuantize, LearnedFakeQuantize))]
    return {
        quantizer: {name: tensor.detach().clone() for name, tensor in _state(quantizer) if name not in _SWITCHES}
        for quantizer in quantizers
        if isinstance(quantizer.activation_post_process, RangeObserver) and bool(quantizer.rests_on_data())
    }


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _set_modes(model: nn.Module, run: Run) -> None:
    """Give modules the modes of a recorded run, except BatchNorms (eval mode); switch rounding and observation off."""
    for name, module in model.named_modules():
        module.training = run.modes.get(name, run.in_training) and not isinstance(module, _BatchNorm)
        if isinstance(module, SwitchedQuantizer):
            module.disable_fake_quant()
            module.disable_observer()


def _differences(expected: Iterable[Any], got: Iterable[Any]) -> Iterable[str]:
    """Yield one text for each output that differs, given ``(path, tensor)`` pairs of expected and other outputs."""
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
    """Return by how much an output may differ: 1/1000 of its largest finite element (float16: 0.1, bfloat16: 0.3)."""
    finite = tensor[tensor.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return _SAME_OUTPUT.get(tensor.dtype, _SAME_OUTPUT_DEFAULT) * largest + torch.finfo(tensor.dtype).tiny
