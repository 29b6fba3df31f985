"""The command ``demo``.

Train in float, fine-tune with QAT, deploy, and show that the deployed model is the trained one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from tritonq.cli.checkpoints import ModelRecipe, save_training
from tritonq.cli.data import DIGITS, Images, in_memory, open_examples
from tritonq.cli.deployment import onnx_target
from tritonq.cli.models import check_trains
from tritonq.cli.preprocessing import Preprocessing
from tritonq.demo.fine_tuning import FIXED_POINT, INT8, FineTuning
from tritonq.demo.model import SmallResNet
from tritonq.demo.picture import draw, widest_channel
from tritonq.demo.result import Files, Result, Stage, table
from tritonq.demo.training import History, accuracy, logits, train
from tritonq.deploy import convert, export_onnx, save_converted, verify
from tritonq.deploy.convertible import why_not_deployable
from tritonq.deploy.files import save_atomically
from tritonq.deploy.onnx_session import open_session
from tritonq.nn import QATLayer
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.prepare import disable_observer, freeze_bn_stats, prepare_qat
from tritonq.qconfig import DEFAULT_PRESET, PRESETS, QConfig, get_qconfig
from tritonq.qconfig_files import mapping_to_data
from tritonq.qconfig_mapping import QConfigMapping

_FLOAT_LEARNING_RATE = 0.05
_FIXED_POINT_PRESET = "f8net"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq demo``.

    They are ``--data``, ``--image-size``, ``--output``, ``--qconfig``, ``--scheme``, ``--epochs``, ``--qat-epochs`` and
    ``--seed``. With ``--scheme f8net`` the preset is "f8net", 8-bit fixed point, whatever ``--qconfig`` says.
    """
    parser.add_argument("--data", type=Path, metavar="DIR", help="images in DIR/<class>/* instead of the digits")
    parser.add_argument("--image-size", type=int, default=32, metavar="N", help="side that --data images are scaled to")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where files are written"
    )
    parser.add_argument("--qconfig", default=DEFAULT_PRESET, metavar="NAME", help=f"preset: {', '.join(PRESETS)}")
    parser.add_argument(
        "--scheme", choices=("int8", "f8net"), default="int8", help="8-bit codes with scales, or 8-bit fixed point"
    )
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=8, metavar="N", help="epochs of QAT fine-tuning")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first weights and the images' order")


def main(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table; return 0 if the deployed models agree with the trained one, else 1.

    Models and a picture are written to the folder ``arguments.output``.

    Args:
        arguments: the parsed command line, with the options of :func:`add_arguments`.

    Raises:
        ValueError: fewer than one epoch, or images or a preset that can't be used.
        OSError: a file can't be written.
        ImportError: a package that the demo needs is missing.
    """
    result = run(arguments)
    print(f"\n{table(result.stages)}\n\nwritten: {', '.join(str(path) for path in vars(result.files).values())}")
    if result.disagreement is None:
        return 0
    print(f"\nFAILED: {result.disagreement}")
    return 1


def run(arguments: argparse.Namespace) -> Result:
    """Train a float model, fine-tune it with rounding, deploy, verify and draw; return a `Result`.

    It has the accuracy of each form of the model and the paths of all files, which are replaced where they exist.
    Torch's global generator is seeded.

    Args:
        arguments: the parsed command line, with the options of :func:`add_arguments`.

    Raises:
        ValueError: fewer than one epoch, images that can't be used, an unknown preset, or one that can't be trained or
            deployed with this model, such as "mxfp8".
        OSError: a file can't be written.
        ImportError: scikit-learn (for the digits), matplotlib, onnx or onnxruntime is missing.
    """
    for name in ("epochs", "qat_epochs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(arguments, name)}")
    is_fixed_point = _FIXED_POINT_PRESET in (arguments.scheme, arguments.qconfig)
    training = FIXED_POINT if is_fixed_point else INT8
    qconfig = get_qconfig(_FIXED_POINT_PRESET if is_fixed_point else arguments.qconfig)
    data = load_images(arguments)
    announce(data)
    torch.manual_seed(arguments.seed)
    model = SmallResNet(data.train_images.shape[1], len(data.classes))
    check_qconfig(model, qconfig, arguments.qconfig, data.train_images[: training.examples])
    files = Files.inside(arguments.output, _FIXED_POINT_PRESET if is_fixed_point else arguments.scheme)
    float_run = train(
        model, data, epochs=arguments.epochs, learning_rate=_FLOAT_LEARNING_RATE, label="float", seed=arguments.seed
    )
    save_atomically(files.float_model, model.state_dict())

    qat = prepare_qat(model, qconfig=qconfig, example_inputs=data.train_images[: training.examples])
    qat_run = fine_tune(qat, data, training, arguments.qat_epochs, arguments.seed)
    save_training(files.qat_model, demo_recipe(qconfig, data), {"state_dict": qat.state_dict()})
    converted = convert(qat)
    save_converted(converted, files.converted)
    export_onnx(converted, files.onnx, data.train_images[:2], target=onnx_target(converted))
    name, layer = largest_layer(qat)
    draw(files.picture, float_run, qat_run, name, widest_channel(layer))

    def score(outputs: Tensor) -> float:
        return accuracy(outputs, data.test_labels)

    images, in_onnx = data.test_images, files.onnx
    stages = (
        Stage("float", score(logits(model, images)), files.float_model, float_run.seconds_per_epoch),
        Stage(training.trained, score(logits(qat, images)), None, qat_run.seconds_per_epoch),
        Stage(
            training.converted, score(logits(converted, images)), files.converted, report=verify(qat, converted, images)
        ),
        Stage("ONNX Runtime", score(onnx_logits(in_onnx, images)), in_onnx, report=verify(qat, in_onnx, images)),
    )
    return Result(stages, files)


def check_qconfig(model: nn.Module, qconfig: QConfig, name: str, images: Tensor) -> None:
    """Prepare a copy of a model, to find before any training what would keep it from being trained or deployed.

    Args:
        model: the float model.
        qconfig: what it is prepared with.
        name: the preset's name, for the error's text.
        images: examples of its input.

    Raises:
        ValueError: the model can't be prepared, trained or converted with this qconfig.
    """
    with torch.random.fork_rng(devices=[]):
        qat = prepare_qat(model, qconfig=qconfig, example_inputs=images)
    check_trains(qat, name)
    reason = why_not_deployable(qat)
    if reason is not None:
        raise ValueError(f"{name} can't be deployed here: {reason}")


def load_images(arguments: argparse.Namespace) -> Images:
    """Return the images of the folder that ``--data`` names, or scikit-learn's digits without it.

    Half are held out, unless the folder has ``train`` and ``val``. The result holds in memory: images as the model
    reads them (those of a folder scaled to ``--image-size``), labels, class names, and how images were scaled.

    Raises:
        ValueError: no such folder, too few classes, a class with too few readable images, or an image size below 1.
    """
    size = 8 if arguments.data is None else arguments.image_size
    preprocessing = Preprocessing(size, size, channels=1 if arguments.data is None else 3)
    return in_memory(open_examples(str(arguments.data or DIGITS), preprocessing))


def announce(data: Images) -> None:
    """Print in one line which images the demo uses, and how many.

    It reads "scikit-learn's digits: 898 images to train with, 899 held out, 10 classes".
    """
    print(
        f"{data.name}: {len(data.train_labels)} images to train with, {len(data.test_labels)} held out, "
        f"{len(data.classes)} classes",
        flush=True,
    )


def demo_recipe(qconfig: QConfig, data: Images) -> ModelRecipe:
    """Return the model recipe of the demo's model: factory, arguments, qconfig, scaling of images and class names.

    ``qconfig`` is that of all layers. The checkpoint holds the recipe, so that ``python -m tritonq report`` can make
    the model again.
    """
    arguments = (f"in_channels={data.preprocessing.channels}", f"classes={len(data.classes)}")
    mapping = mapping_to_data(QConfigMapping().set_global(qconfig))
    return ModelRecipe("tritonq.demo.model:SmallResNet", arguments, mapping, data.preprocessing, data.classes)


def fine_tune(qat: nn.Module, data: Images, training: FineTuning, epochs: int, seed: int) -> History:
    """Train ``qat`` in place with fake quantization for ``epochs`` epochs; return losses and times as a `History`.

    Ranges and BatchNorm statistics are frozen in the last ``training.frozen_epochs`` epochs, never in the first one,
    and stay so. ``seed`` decides the order of the training images.
    """

    def freeze(epoch: int) -> None:
        if training.frozen_epochs and epoch == max(epochs - training.frozen_epochs, 1):
            disable_observer(qat)
            freeze_bn_stats(qat)

    rate = training.learning_rate
    return train(qat, data, epochs=epochs, learning_rate=rate, label=training.label, seed=seed, before_epoch=freeze)


def onnx_logits(path: Path, images: Tensor) -> Tensor:
    """Return the logits (n, classes) that ONNX Runtime computes from the file at ``path``, in one call.

    ``images`` are float32 (n, channels, height, width), on the CPU.
    """
    session = open_session(path)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(outputs)


def largest_layer(model: nn.Module) -> tuple[str, QATLayer | FixedPointLayer]:
    """Return name and module of the quantization-aware layer of a prepared model that has the most weights.

    Of several it is the first.

    Raises:
        ValueError: there is no such layer.
    """
    kinds = (QATLayer, FixedPointLayer)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    return max(layers, key=lambda item: item[1].weight.numel())
