"""Check that a checkpoint is of the run that is to be continued from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritonq.cli.checkpoints import ModelRecipe, check_entries, read_training, recipe_to_data
from tritonq.cli.earlier_fields import with_defaults
from tritonq.cli.settings import Settings
from tritonq.cli.training_log import history_from_data

# What is known once the images were read, mean and deviation included.
_OF_IMAGES = frozenset({"data", "preprocessing"})
# What a run that is finished may be given anew, to go on for more epochs.
_OF_THE_SCHEDULE = frozenset({"epochs", "frozen_epochs", "learning_rate", "begin"})


# What a run needs to go on, besides the weights.
_OF_A_RUN = {"settings": Mapping, "step": int, "optimizer": Mapping, "scaler": Mapping, "random": (Mapping, list)}


def read_run(path: Path) -> tuple[ModelRecipe, dict[str, Any]]:
    """Return the model recipe and all entries of a checkpoint from which a run can go on, such as ``last.pt``.

    Entries are by name, such as ``"step"``; tensors are on the CPU.

    Raises:
        ValueError: no such file, a damaged one, one that is no checkpoint or of a later version, or a checkpoint with
            weights only, such as ``best.pt``.
    """
    made, content = read_training(path)
    try:
        check_entries(content, _OF_A_RUN)
        check_entries(content["optimizer"], {"state": Mapping, "param_groups": list})
        history_from_data(content.get("history", []))
    except ValueError as error:
        raise ValueError(
            f"{path} can't be resumed: {error}; last.pt holds a run, best.pt the weights of an epoch"
        ) from error
    return made, content


def is_extended(content: Mapping[str, Any], epochs: int, steps_per_epoch: int | None = None) -> bool:
    """Whether the run of a checkpoint was finished, and more epochs are asked for now.

    It was finished if the last epoch in its history has the number ``epochs`` of its settings; a run that ``patience``
    ended earlier was not.

    Args:
        content: entries of the checkpoint, from :func:`read_run`.
        epochs: how many are asked for in all, those of the checkpoint included.
        steps_per_epoch: steps in an epoch of the checkpoint's run. It is read only without a history, as in checkpoints
            of tritonq 0.1.0: the run was finished if it did so many steps for each epoch of its settings. None: a run
            without a history counts as unfinished.
    """
    finished = int(saved_settings(content).get("epochs", 0))
    history = content.get("history")
    if history:
        return bool(history[-1]["epoch"] == finished < epochs)
    return steps_per_epoch is not None and content["step"] == finished * steps_per_epoch and finished < epochs


def saved_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the checkpoint ``content`` by the names of :class:`Settings`' fields; ``{}`` without any.

    It is the checkpoint's own dict; one of an earlier version may lack fields.
    """
    saved = content.get("settings")
    return saved if isinstance(saved, dict) else {}


def processes_of(content: Mapping[str, Any]) -> int:
    """Return how many processes trained together when the checkpoint ``content`` was written."""
    random = content["random"]
    return len(random) if isinstance(random, list) else 1


def step_among(step: int, steps_per_epoch: int, now: int) -> int:
    """Return how many steps count as done when a run goes on with another number of steps in each epoch.

    The number changes with that of the processes: more of them leave out a last batch that is too small to share. All
    other batches are the same, so that the position in the epoch stays.

    Args:
        step: how many steps were done.
        steps_per_epoch: steps in an epoch when they were done.
        now: steps in an epoch from here on.

    Raises:
        ValueError: the step that comes next is one that is left out now.

    Examples:
        >>> step_among(13, steps_per_epoch=5, now=4)  # two epochs and three steps
        11
    """
    epoch, within = divmod(step, steps_per_epoch)
    if within >= now:
        raise ValueError(f"step {step} is followed by a batch that is too small for so many processes: start fewer")
    return epoch * now + within


def check_before_images(
    path: Path, made: ModelRecipe, settings: Settings, saved: ModelRecipe, content: Mapping[str, Any]
) -> None:
    """Compare a checkpoint with the run that is to be resumed, before images are read: model, qconfig, settings.

    The names of classes are compared, too. What depends on images (their fingerprint, preprocessing), the setting
    ``begin``, and everything in a checkpoint of version 1 of the format (its entry ``"version"``) is left to
    :func:`check_same_run`. If the checkpoint's run was finished and this one has more epochs (:func:`is_extended`),
    epochs, frozen epochs and learning rate may differ.

    Args:
        path: of the checkpoint, for the error's text.
        made: how this run makes its model.
        settings: of this run.
        saved: how the checkpoint's run made its model.
        content: the checkpoint.

    Raises:
        ValueError: the checkpoint is of another run; everything that differs is named.
    """
    if content["version"] > 1:
        ignored = _OF_IMAGES | (_OF_THE_SCHEDULE if is_extended(content, settings.epochs) else {"begin"})
        _check(path, made, settings, saved, content, ignored)


def check_same_run(
    path: Path, made: ModelRecipe, settings: Settings, saved: ModelRecipe, content: Mapping[str, Any], *, extends: bool
) -> None:
    """Compare everything in a checkpoint that decides the numbers of a run with the run that is to be resumed.

    Args:
        path: of the checkpoint, for the error's text.
        made: how this run makes its model.
        settings: of this run.
        saved: how the checkpoint's run made its model.
        content: the checkpoint. If its entry ``"version"``, that of the format, is 1, images, preprocessing and classes
            are not compared.
        extends: whether more epochs are added to a finished run; the settings ``epochs``, ``frozen_epochs``,
            ``learning_rate`` and ``begin`` may differ then.

    Raises:
        ValueError: the checkpoint is of another run; everything that differs is named.
    """
    _check(path, made, settings, saved, content, _OF_THE_SCHEDULE if extends else ())


def _check(
    path: Path,
    made: ModelRecipe,
    settings: Settings,
    saved: ModelRecipe,
    content: Mapping[str, Any],
    ignored: Collection[str],
) -> None:
    mine = {**asdict(settings), **recipe_to_data(made)}
    # A setting that the checkpoint's version did not have yet was what its default does.
    theirs = {**with_defaults(Settings, saved_settings(content)), **recipe_to_data(saved)}
    if content["version"] == 1:  # which knew the folder's name, and nothing of preprocessing and classes
        ignored = {*ignored, "data", "preprocessing", "classes"}
    differing = [
        f"its {name.replace('_', ' ')} is {_shown(name, theirs.get(name), value)}"
        for name, value in mine.items()
        if name not in ignored and value != theirs.get(name)
    ]
    if differing:
        raise ValueError(f"{path} is of another run: {'; '.join(differing)}")


def _shown(name: str, theirs: Any, mine: Any) -> str:
    if name == "data":
        return "that of other images: the files, their classes or the share held out have changed"
    if name == "preprocessing":
        names = [key for key in mine if mine[key] != theirs[key]]
        theirs, mine = ({key: data[key] for key in names} for data in (theirs, mine))
    return f"{theirs!r}, not {mine!r}"
