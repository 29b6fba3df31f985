"""Run a model on its example inputs and record it: once in eval mode and once in training mode."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.prepare.record.closures import error_text
from tritonq.prepare.record.dataflow import Dataflow
from tritonq.prepare.record.operations import is_leaf
from tritonq.prepare.record.recorder import Recorder
from tritonq.prepare.record.snapshot import ModelSnapshot

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# A training forward that fails is tried again with the module that failed in eval mode, at most so many times.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Run:
    """One recorded run of a model, with its arguments and its result.

    Attributes:
        flow: the record of the run.
        args: positional arguments of the model, as given; the run read copies of their tensors.
        kwargs: named arguments of the model, likewise.
        result: what the model returned, without gradients.
        modes: for each module, by qualified name, whether it ran in training mode; False for every BatchNorm.
    """

    flow: Dataflow
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    modes: Mapping[str, bool]

    @property
    def in_training(self) -> bool:
        """Whether some module ran in training mode."""
        return any(self.modes.values())


@dataclass(frozen=True)
class Recording:
    """The recorded runs of a model.

    Attributes:
        in_eval: the run in eval mode.
        in_training: the run in training mode; None if the model can't run so on its example inputs.
        held: qualified names of modules that ran in eval mode in the training run, because their own forward raises an
            error in training mode. Their children ran in training mode. Empty if ``in_training`` is None.
        obstacle: text of the first error in training mode, such as ``"ValueError: no targets (in 'head', a Head)"``; ""
            if there was none.
    """

    in_eval: Run
    in_training: Run | None
    held: frozenset[str] = frozenset()
    obstacle: str = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that took place: ``(in_eval,)`` or ``(in_eval, in_training)``."""
        return (self.in_eval,) if self.in_training is None else (self.in_eval, self.in_training)

    @property
    def flow(self) -> Dataflow:
        """The record of all runs; the one in eval mode is run 0, the one in training mode run 1."""
        flow = self.in_eval.flow
        return flow if self.in_training is None else flow.joined(self.in_training.flow)


def record_examples(model: nn.Module, example_inputs: Any, training_inputs: Any = None) -> Recording:
    """Run a model in eval mode and in training mode, without gradients, and record both runs.

    BatchNorms use their running statistics in both runs, so that a batch of one image is enough. If the forward of a
    module fails in training mode (a detector without targets, for example), that module runs in eval mode and its
    children still run in training mode. If the model fails all the same, there is no training run.

    Args:
        model: the model, left as it is. If it is in training mode, submodules in eval mode stay in eval mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of named arguments.
        training_inputs: the same for the training run; None: ``example_inputs``. With it nothing runs in eval mode
            instead: an error in training mode is raised.

    Raises:
        ValueError: the model rejects ``example_inputs`` in eval mode, or ``training_inputs`` in training mode; it
            returns an iterator in eval mode; it has lazy parameters; or it has tensors on the device "meta", which hold
            no values.
        TypeError: inputs of another type, or a dict whose keys are not all strings.
    """
    _check_values(model)
    args, kwargs = example_arguments(example_inputs)
    recorder = Recorder(model)
    try:
        flow = recorder.run(args, kwargs)
    except Exception as error:
        text = error_text(error) + _place(model, recorder.running())
        raise ValueError(f"{type(model).__name__} rejects example_inputs: {text}") from error
    if isinstance(recorder.result, Iterator):
        kind = type(recorder.result).__name__
        raise ValueError(
            f"{type(model).__name__} returns a {kind}, which runs when it is read and not before: let it return a list"
        )
    in_eval = Run(flow, args, kwargs, recorder.result, {name: False for name, _ in model.named_modules()})
    passing = frozenset(
        str(call.module_name) for call in flow.calls if isinstance(call.target, nn.Module) and not is_leaf(call.target)
    )
    if training_inputs is None:
        return _with_training(model, in_eval, passing)
    args, kwargs = example_arguments(training_inputs, "training_inputs")
    modes = training_modes(model)
    try:
        in_training = _run(model, modes, args, kwargs, passing)
    except _ForwardError as failure:
        text = error_text(failure.error) + failure.place
        raise ValueError(f"{type(model).__name__} rejects training_inputs in training mode: {text}") from failure.error
    return Recording(in_eval, in_training)


class _ForwardError(Exception):
    """An error that a forward raised in the training run.

    Attributes:
        error: the error.
        where: the innermost running module that was in training mode; None if all running modules were in eval mode.
        place: the end of a message, which names the submodule that failed; "" for the model itself.
    """

    def __init__(self, error: Exception, where: nn.Module | None, place: str) -> None:
        super().__init__(str(error))
        self.error, self.where, self.place = error, where, place


def _with_training(model: nn.Module, in_eval: Run, passing: frozenset[str]) -> Recording:
    """Record a training run on the arguments of the eval run, and return both.

    A module whose forward fails is switched to eval mode and the run is repeated, at most ``_ATTEMPTS`` times.

    Args:
        model: the model.
        in_eval: the recorded run in eval mode.
        passing: qualified names of modules that returned their input unchanged in the eval run.
    """
    modes, names = training_modes(model), {module: name for name, module in model.named_modules()}
    held: set[str] = set()
    obstacle = ""
    for _ in range(_ATTEMPTS):
        try:
            run = _run(model, modes, in_eval.args, in_eval.kwargs, passing)
        except _ForwardError as failure:
            obstacle = obstacle or error_text(failure.error) + failure.place
            if failure.where is None:
                break
            modes[failure.where] = False
            held.add(names[failure.where])
        else:
            return Recording(in_eval, run, frozenset(held), obstacle)
    return Recording(in_eval, None, frozenset(), obstacle)


def _run(
    model: nn.Module,
    modes: Mapping[nn.Module, bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    passing: frozenset[str],
) -> Run:
    """Record one run.

    Args:
        model: the model.
        modes: for each module, whether it runs in training mode.
        args: positional arguments of the model.
        kwargs: named arguments of the model.
        passing: qualified names of modules that returned their input unchanged in the eval run.

    Raises:
        _ForwardError: the model raised an error.
    """
    recorder = Recorder(model, modes, passing)
    try:
        flow = recorder.run(args, kwargs)
    except Exception as error:
        running = recorder.running()
        where = next((module for module in running if modes[module]), None)
        raise _ForwardError(error, where, _place(model, running)) from error
    by_name = {name: modes[module] for name, module in model.named_modules(remove_duplicate=False)}
    return Run(flow, args, kwargs, recorder.result, by_name)


def training_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Return for each module whether it is in training mode while the model trains; False for every BatchNorm.

    If the model is in training mode, submodules in eval mode count as in eval mode; else all of it is switched to
    training mode to find out. The model itself is left in its modes.
    """
    snapshot = ModelSnapshot(model)
    try:
        if not model.training:
            model.train()
        return {module: module.training and not isinstance(module, _BatchNorm) for module in model.modules()}
    finally:
        snapshot.restore()


def _place(model: nn.Module, running: list[nn.Module]) -> str:
    """Return the end of a message that names the submodule which failed, such as ``" (in 'head', a Head)"``.

    ``running`` holds the modules whose forwards ran, innermost first. Returns "" if only the model itself ran.
    """
    names = {module: name for name, module in model.named_modules()}
    return f" (in {names[running[0]]!r}, a {type(running[0]).__name__})" if running and names[running[0]] else ""


def example_arguments(example_inputs: Any, name: str = "example_inputs") -> Arguments:
    """Return ``(positional arguments, named arguments)`` of a model from its example inputs.

    A tensor is one positional argument; a tuple or list holds the positional ones; a dict holds the named ones.

    Args:
        example_inputs: the example inputs.
        name: what the message of the error calls them, such as "training_inputs".

    Raises:
        TypeError: anything else, also a dict whose keys are not all strings.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TypeError(
        f"{name} must be a tensor, a tuple of positional arguments or a dict of named ones, got "
        f"{type(example_inputs).__qualname__}"
    )


def _check_values(model: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer is on the device "meta" and so holds no values."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    name = next((name for name, tensor in tensors if tensor.is_meta), None)
    if name is not None:
        raise ValueError(
            f"{type(model).__name__} has tensors without values ({name!r} is on the device meta): give it a device and "
            "weights first, as by model.to_empty(device=…) and load_state_dict"
        )
