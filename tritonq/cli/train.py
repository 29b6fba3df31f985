"""The command ``train``: quantization-aware training of a user's classifier, from its factory to the deployed files."""

from __future__ import annotations

import argparse
import copy
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from tritonq.cli.augment import OWN, TORCHVISION, Augmentation
from tritonq.cli.checkpoints import FORMAT, ModelRecipe, has_format, load_state, load_weights, read_training
from tritonq.cli.classification import accuracy, count_right, in_order, logits
from tritonq.cli.data import DIGITS, Examples, add_data_arguments, class_names, open_examples, stacked
from tritonq.cli.deployment import Deployed, deploy
from tritonq.cli.messages import named
from tritonq.cli.models import (
    add_model_arguments,
    add_qconfig_argument,
    check_trains,
    find_device,
    find_qconfig,
    make_model,
    prepare,
)
from tritonq.cli.paths import held_folder, writable_folder
from tritonq.cli.preprocessing import add_preprocessing_arguments, choose_preprocessing
from tritonq.cli.processes import Processes, joined
from tritonq.cli.same_run import check_before_images, read_run
from tritonq.cli.settings import AMP, Settings
from tritonq.cli.training_log import Epoch, TensorBoard, check_tensorboard, is_own_log
from tritonq.cli.training_loop import Run
from tritonq.deploy.convertible import why_not_deployable
from tritonq.prepare import update_bn_stats
from tritonq.qconfig_files import mapping_to_data
from tritonq.qconfig_mapping import QConfigMapping
from tritonq.recipes import recipe_for
from tritonq.report.summary import summary

# Mean and deviation that float models are often trained with; tried where the user gave none.
_USUAL_SCALING = (("0", "1"), ("0.5", "0.5"), ("0.485,0.456,0.406", "0.229,0.224,0.225"))
_IMAGES_TRIED = 256
_CLEARLY_BETTER = 0.05
# A float model that is hardly better than guessing was given another preprocessing, or no weights.
_NEAR_CHANCE = 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq train``: model, images, qconfig, schedule, device and output folder."""
    parser.epilog = (
        "Example: python -m tritonq train torchvision.models:resnet18 photos --model-arg num_classes=5 "
        "--weights resnet18.pt --preprocessing torchvision --image-size 96. Without --weights, training begins with "
        "what the factory gives. Files are read when they are needed; without --validation every second one of each "
        "class is held out. A run that was interrupted goes on with --resume, from its last complete checkpoint, to "
        "the same bits; a finished one with --resume and more --epochs. On several GPUs: torchrun --nproc-per-node 4 "
        "-m tritonq train …, where Ctrl-C goes back to the last checkpoint."
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="makes the float model, importable from here")
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_qconfig_argument(parser)
    add_preprocessing_arguments(parser)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state dict of the trained float model")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="how many in all")
    parser.add_argument(
        "--frozen-epochs",
        type=int,
        metavar="N",
        help="last epochs, trained on the ranges and statistics that will be deployed; default a quarter, none where "
        "the qconfig has fewer than five bits (tritonq.recipes)",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per step, of all GPUs together")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read images ahead; 0: this one reads"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="at the start; default 0.005, and 0.02 where the qconfig has fewer than five bits (tritonq.recipes)",
    )
    parser.add_argument(
        "--augment",
        default="none",
        metavar="NAMES",
        help=f"random changes of training images, with commas between: {', '.join(OWN)}; with torchvision "
        f"{', '.join(TORCHVISION)}",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of images and of dropout")
    parser.add_argument("--amp", choices=list(AMP), default="off", help="autocast; float16 scales gradients")
    parser.add_argument("--device", metavar="NAME", help="cuda where there is one, else cpu, if not given")
    parser.add_argument("--output", type=Path, default=Path("train-output"), metavar="DIR", help="where files go")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/last.pt, or begin where there is none")
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="write DIR/last.pt so often, besides once per epoch"
    )
    parser.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without a better accuracy")
    parser.add_argument("--deploy", choices=get_args(Deployed), default="best", help="which epoch's model is deployed")
    parser.add_argument("--no-onnx", action="store_true", help="write no DIR/model.onnx")
    parser.add_argument("--tensorboard", action="store_true", help="log to DIR/tensorboard too (extra tensorboard)")


def main(arguments: argparse.Namespace) -> int:
    """Train, convert, verify, and print the accuracy of trained, converted and ONNX model; return the exit status.

    It is 1 if the converted model does not agree with the trained one, else 0. It is also 0 if the model can't be
    deployed, and in all processes but the first.

    Raises:
        ValueError: an option that makes no sense, a file that can't be read or used, or a training that diverges; the
            command shows the message.
        OSError: a file that is needed can't be written.
        Interrupted: a signal such as Ctrl-C ended the training after a whole step.
    """
    with ExitStack() as held:
        return _main(arguments, held)


def _main(arguments: argparse.Namespace, held: ExitStack) -> int:
    """Run the command. Every mistake that can be found without an image is reported before the first image is read.

    ``held`` is left when the command ends: it frees the output folder and leaves the other processes.
    """
    mapping = find_qconfig(arguments.qconfig)
    settings = _settings(arguments, mapping)
    processes, device = held.enter_context(joined(find_device(arguments.device)))
    settings.check_shares(processes.count)
    torch.manual_seed(settings.seed)
    model = make_model(arguments.model, arguments.model_arg)
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    preprocessing = choose_preprocessing(arguments, model, arguments.data == DIGITS)
    classes = class_names(arguments.data, arguments.validation)
    qconfig = mapping_to_data(mapping)
    made = ModelRecipe(arguments.model, tuple(arguments.model_arg), qconfig, preprocessing, classes)
    _check_classes(model, made)
    trainable = prepare(made, copy.deepcopy(model))
    check_trains(trainable, arguments.qconfig)
    wants_board = arguments.tensorboard and processes.is_first
    if wants_board:
        check_tensorboard()
    _check_place(arguments)
    if processes.is_first:
        held.enter_context(held_folder(writable_folder(arguments.output)))
    saved = _saved_run(arguments, made, settings)
    board = TensorBoard(arguments.output / "tensorboard") if wants_board else None

    quiet = not processes.is_first
    data = open_examples(arguments.data, preprocessing, arguments.validation, arguments.workers, quiet=quiet)
    finds_scaling = arguments.weights is not None and not preprocessing.mean and saved is None
    kept = None if saved is None else saved.get("float_accuracy")
    float_accuracy = _try_float_model(arguments, model.to(device), data, processes, kept, finds_scaling)
    made = replace(made, preprocessing=data.preprocessing, classes=data.classes)
    run = Run(
        made,
        trainable.to(device),
        replace(settings, data=data.fingerprint),
        data,
        arguments.output,
        workers=arguments.workers,
        patience=arguments.patience,
        processes=processes,
        board=board,
        float_accuracy=float_accuracy,
    )
    if saved is not None:
        step = run.resume()
        if processes.is_first:
            print(f"resuming at step {step} of {run.steps}", flush=True)
    no_files = why_not_deployable(run.model)
    if processes.is_first:
        print(summary(run.model).line, flush=True)
        if no_files is not None:
            print(f"the run ends with checkpoints, without int8 and ONNX files: {no_files}", flush=True)
    run.train(arguments.checkpoint_every or run.steps_per_epoch)
    if not processes.is_first:
        return 0
    _take_deployed_epoch(run, arguments.deploy)
    if no_files is not None:
        print(f"written: {', '.join(str(arguments.output / name) for name in ('last.pt', 'best.pt', 'log.csv'))}")
        return 0
    return deploy(run.model.cpu(), made, data, arguments.output, arguments.workers, onnx=not arguments.no_onnx)


def _settings(arguments: argparse.Namespace, mapping: QConfigMapping) -> Settings:
    """Return the settings that decide the run's numbers.

    They are the options, and for options that were not given the values of a recipe.
    """
    recipe = recipe_for(mapping)
    frozen = int(arguments.epochs * recipe.frozen_share) if arguments.frozen_epochs is None else arguments.frozen_epochs
    settings = Settings(
        data="",  # known once the images are found
        epochs=arguments.epochs,
        frozen_epochs=frozen,
        batch_size=arguments.batch_size,
        learning_rate=recipe.learning_rate if arguments.learning_rate is None else arguments.learning_rate,
        seed=arguments.seed,
        amp=arguments.amp,
        augment=str(Augmentation.named(arguments.augment)),
    )
    for name, least in (("workers", 0), ("patience", 1), ("checkpoint_every", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {value}")
    return settings


def _check_place(arguments: argparse.Namespace) -> None:
    """Raise ValueError if the output folder would lie among the classes' folders."""
    if arguments.data != DIGITS and arguments.output.resolve().parent == Path(arguments.data).resolve():
        raise ValueError(f"{arguments.output} would be a class of {arguments.data}: pass an --output elsewhere")


def _saved_run(arguments: argparse.Namespace, made: ModelRecipe, settings: Settings) -> dict[str, Any] | None:
    """Return the content of the checkpoint from which ``--resume`` goes on; None: the run begins.

    Raises:
        ValueError: a checkpoint without ``--resume``, one of another run, or files of other programs that the run would
            replace.
    """
    path = arguments.output / "last.pt"
    if not path.exists():
        _check_for_others(arguments.output)
        return None
    if not arguments.resume:
        raise ValueError(f"{path} exists: pass --resume to go on from it, or another --output")
    saved_recipe, saved = read_run(path)
    check_before_images(path, made, settings, saved_recipe, saved)
    return saved


def _check_for_others(folder: Path) -> None:
    """Refuse a folder, without a run's ``last.pt``, in which the run would replace files of other programs.

    A run that was killed before its first checkpoint may have left ``best.pt`` and ``log.csv``.
    """
    best = folder / "best.pt"
    if best.exists() and has_format(best, FORMAT):
        return
    log = folder / "log.csv"
    theirs = [best, folder / "model.int8.pt", folder / "model.onnx", *([] if is_own_log(log) else [log])]
    found = next((path for path in theirs if path.exists()), None)
    if found is not None:
        raise ValueError(f"{found} exists, and train writes a file of this name: pass another --output")


def _try_float_model(
    arguments: argparse.Namespace,
    model: nn.Module,
    data: Examples,
    processes: Processes,
    kept: float | None,
    finds_scaling: bool,
) -> float:
    """Print what the data are and how well the float model does on them; return its accuracy.

    Args:
        arguments: of the command.
        model: in float.
        data: what it is tried on.
        processes: those that share the work; the first one prints.
        kept: the accuracy that a resumed run found when it began; None: it is measured.
        finds_scaling: whether other means and deviations are tried.
    """
    if processes.is_first:
        counts = f"{len(data.train)} images to train with, {len(data.test)} held out, {len(data.classes)} classes"
        print(f"{data.name}: {counts}; {data.preprocessing}", flush=True)
    share = _float_accuracy(model, data, arguments.workers, processes) if kept is None else kept
    if processes.is_first:
        _tell_float_accuracy(share, data, arguments.weights)
        if finds_scaling:
            _tell_better_scaling(model, data)
    return share


def _take_deployed_epoch(run: Run, choice: Deployed) -> None:
    """Give the model the weights of the epoch that is deployed: the best, or the last, which it has already.

    Raises:
        ValueError: the best is wanted, and its file is gone, damaged or of another epoch.
    """
    if run.stopped:
        print(f"stopped after epoch {run.history[-1].epoch}: no better accuracy for {run.patience} epochs", flush=True)
    best = run.best
    if choice == "best" and best is not None and best is not run.history[-1]:
        update_bn_stats(run.model)  # a state dict says only of frozen layers that they are
        try:
            load_state(run.model, _best_weights(run.best_path, best), str(run.best_path))
        except ValueError as error:
            raise ValueError(f"{error}; --resume --deploy last takes the last epoch") from error
        print(f"deployed is epoch {best.epoch}, the best; --deploy last takes the last", flush=True)


def _best_weights(path: Path, best: Epoch) -> dict[str, torch.Tensor]:
    _, content = read_training(path)
    if content.get("step") != best.step:  # a disk was full when it should have been written
        raise ValueError(f"{path} holds step {content.get('step')}; epoch {best.epoch}, the best, ended at {best.step}")
    state: dict[str, torch.Tensor] = content["state_dict"]
    return state


def _check_classes(model: nn.Module, made: ModelRecipe) -> None:
    classes, images = len(made.classes), made.preprocessing.example()
    try:
        answers = logits(model, images).shape
    except Exception as error:  # a user's forward may raise anything
        raise ValueError(f"{made.model} rejects images of shape {tuple(images.shape)}: {named(error)}") from error
    if len(answers) != 2 or answers[1] < classes:
        raise ValueError(
            f"{made.model} returns {tuple(answers)} for two images; the data need (2, {classes} or more): pass the "
            "number of classes with --model-arg"
        )


def _float_accuracy(model: nn.Module, data: Examples, workers: int, processes: Processes) -> float:
    held_out = in_order(data.test, workers, processes.rank, processes.count)
    right, count = processes.summed(*count_right(lambda images: logits(model, images), held_out))
    return right / count


def _tell_float_accuracy(share: float, data: Examples, weights: Path | None) -> None:
    origin = f"with {weights}" if weights is not None else "as its factory gives it"
    print(f"float model: accuracy {share:.2%} on the held-out images, {origin}", flush=True)
    if weights is not None and share < _NEAR_CHANCE / len(data.classes):
        print(
            "tritonq train: that is hardly better than guessing: was the float model trained with other preprocessing? "
            "See --preprocessing, --mean, --std, --crop, --image-size, or with another order of classes?",
            file=sys.stderr,
            flush=True,
        )


def _tell_better_scaling(model: nn.Module, data: Examples) -> None:
    """Print a line to stderr if the float model does clearly better with a usual mean and deviation than with its own.

    Three pairs are tried on up to 256 held-out images; clearly is by more than 5 % of them.
    """
    count = len(data.test)
    chosen = torch.linspace(0, count - 1, min(count, _IMAGES_TRIED)).long().tolist()
    images, labels = stacked(data.test, chosen)
    channels = images.shape[1]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.preprocessing.mean, data.preprocessing.std))
    scores = {("", ""): accuracy(logits(model, images), labels)}
    for words in _USUAL_SCALING:
        values = [tuple(map(float, word.split(","))) for word in words]
        if all(len(value) in (1, channels) for value in values):
            other_mean, other_std = (torch.tensor(value).view(-1, 1, 1) for value in values)
            scores[words] = accuracy(logits(model, (images * std + mean - other_mean) / other_std), labels)
    best = max(scores, key=lambda words: scores[words])
    if scores[best] > scores["", ""] + _CLEARLY_BETTER:
        print(
            f"tritonq train: with --mean {best[0]} --std {best[1]} the float model has {scores[best]:.2%} of "
            f"{len(chosen)} held-out images right, without {scores['', '']:.2%}: begin again with them",
            file=sys.stderr,
            flush=True,
        )
