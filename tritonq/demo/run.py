"""The main job: train in float, fine-tune with QAT, deploy, and show that the deployed model is the trained one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tritonq.cli.data import DIGITS, Images, in_memory, open_examples
from tritonq.cli.preprocessing import Preprocessing
from tritonq.cli.training_files import Recipe, save_training
from tritonq.demo.model import SmallResNet
from tritonq.demo.picture import draw, widest_channel
from tritonq.demo.training import History, accuracy, logits, train
from tritonq.deploy import VerificationReport, convert, export_onnx, save_converted, verify
from tritonq.deploy.comparisons import ISLAND_STEP
from tritonq.deploy.onnx_session import open_session
from tritonq.nn import QATLayer
from tritonq.nn.fixed_point import FixedPointLayer
from tritonq.prepare import disable_observer, freeze_bn_stats, prepare_qat
from tritonq.qconfig import DEFAULT_PRESET, PRESETS, QConfig, get_qconfig
from tritonq.qconfig_files import mapping_to_data
from tritonq.qconfig_mapping import QConfigMapping
from tritonq.report.run import DEMO_FILE

FLOAT_LEARNING_RATE = 0.05
_QAT_LEARNING_RATE = 0.005
# The last QAT epochs train on the ranges and statistics that will be deployed.
_FROZEN_EPOCHS = 2


@dataclass(frozen=True)
class Files:
    """What a run writes, in one folder."""

    float_model: Path
    qat_model: Path
    converted: Path
    onnx: Path
    picture: Path

    @classmethod
    def inside(cls, folder: Path, scheme: str = "int8") -> Files:
        """Their names in ``folder``, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ("model.float.pt", DEMO_FILE, f"model.{scheme}.pt", "model.onnx", "demo.png")
        return cls(*(folder / name for name in names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tritonq demo``."""
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


@dataclass(frozen=True)
class Stage:
    """One form of the model and how it did on the test set.

    Attributes:
        name: which form.
        accuracy: fraction of test images classified correctly.
        file: where it was written, if it was.
        seconds_per_epoch: of its training, if it was trained.
        report: its codes and predictions against those of the QAT model, if it was deployed from it.
    """

    name: str
    accuracy: float
    file: Path | None = None
    seconds_per_epoch: float | None = None
    report: VerificationReport | None = None


@dataclass(frozen=True)
class Result:
    """What the demo did: float, QAT, converted and ONNX Runtime models, and the files."""

    stages: tuple[Stage, ...]
    files: Files

    @property
    def agrees(self) -> bool:
        """Whether no code of a deployed form differs."""
        return self.disagreement is None

    @property
    def disagreement(self) -> str | None:
        """Which form disagrees with the trained model, where, and what is allowed, or None."""
        for stage in self.stages:
            worst = None if stage.report is None else stage.report.first_beyond()
            if worst is not None:
                allowed = "none"
                if worst.island:
                    allowed = f"differences of {ISLAND_STEP}, since {', '.join(worst.island)} adds in no defined order"
                return (
                    f"{stage.name} disagrees with the trained model: {worst.differing:,} of {worst.codes:,} codes of "
                    f"{worst.name or 'the output'} differ, by up to {worst.largest}; allowed: {allowed}"
                )
        return None


def main(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table; 0 when the deployed models agree with the trained one, else 1."""
    if arguments.scheme == "f8net":
        # Which uses this module's files, stages and table.
        from tritonq.demo import fixed_point

        result = fixed_point.run(arguments)
    else:
        result = run(arguments)
    print(f"\n{table(result.stages)}\n\nwritten: {', '.join(str(path) for path in vars(result.files).values())}")
    if result.disagreement is None:
        return 0
    print(f"\nFAILED: {result.disagreement}")
    return 1


def run(arguments: argparse.Namespace) -> Result:
    """Train, fine-tune, deploy, verify, draw."""
    qconfig = get_qconfig(arguments.qconfig)
    data = load_images(arguments)
    announce(data)
    files = Files.inside(arguments.output)
    example = data.train_images[:2]

    torch.manual_seed(arguments.seed)
    model = SmallResNet(data.train_images.shape[1], len(data.classes))
    float_run = train(
        model, data, epochs=arguments.epochs, learning_rate=FLOAT_LEARNING_RATE, label="float", seed=arguments.seed
    )
    torch.save(model.state_dict(), files.float_model)

    qat = prepare_qat(model, qconfig=qconfig, example_inputs=example)
    qat_run = fine_tune(qat, data, arguments.qat_epochs, arguments.seed)
    save_training(files.qat_model, demo_recipe(qconfig, data), {"state_dict": qat.state_dict()})
    converted = convert(qat)
    save_converted(converted, files.converted)
    export_onnx(converted, files.onnx, example, target="onnxruntime")  # which runs it below, whatever the preset
    name, layer = largest_layer(qat)
    draw(files.picture, float_run, qat_run, name, widest_channel(layer))

    def score(outputs: Tensor) -> float:
        return accuracy(outputs, data.test_labels)

    images = data.test_images
    stages = (
        Stage("float", score(logits(model, images)), files.float_model, float_run.seconds_per_epoch),
        Stage("QAT (eval)", score(logits(qat, images)), None, qat_run.seconds_per_epoch),
        Stage("converted", score(logits(converted, images)), files.converted, report=verify(qat, converted, images)),
        Stage(
            "ONNX Runtime", score(onnx_logits(files.onnx, images)), files.onnx, report=verify(qat, files.onnx, images)
        ),
    )
    return Result(stages, files)


def load_images(arguments: argparse.Namespace) -> Images:
    """The digits, or the folder that ``--data`` names."""
    size = 8 if arguments.data is None else arguments.image_size
    preprocessing = Preprocessing(size, size, channels=1 if arguments.data is None else 3)
    return in_memory(open_examples(str(arguments.data or DIGITS), preprocessing))


def announce(data: Images) -> None:
    """Say what there is to train with."""
    print(
        f"{data.name}: {len(data.train_labels)} images to train with, {len(data.test_labels)} held out, "
        f"{len(data.classes)} classes",
        flush=True,
    )


def demo_recipe(qconfig: QConfig, data: Images) -> Recipe:
    """How `python -m tritonq report` makes this model again."""
    arguments = (f"in_channels={data.preprocessing.channels}", f"classes={len(data.classes)}")
    mapping = mapping_to_data(QConfigMapping().set_global(qconfig))
    return Recipe("tritonq.demo.model:SmallResNet", arguments, mapping, data.preprocessing, data.classes)


def fine_tune(qat: nn.Module, data: Images, epochs: int, seed: int) -> History:
    """Train with fake quantization; ranges and BatchNorm statistics are frozen for the last epochs."""

    def freeze(epoch: int) -> None:
        if epoch == max(epochs - _FROZEN_EPOCHS, 1):
            disable_observer(qat)
            freeze_bn_stats(qat)

    return train(
        qat, data, epochs=epochs, learning_rate=_QAT_LEARNING_RATE, label="QAT", seed=seed, before_epoch=freeze
    )


def onnx_logits(path: Path, images: Tensor) -> Tensor:
    """What ONNX Runtime computes from the file."""
    session = open_session(path)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(outputs)


def table(stages: Sequence[Stage]) -> str:
    """One line per stage; what differs is counted against the QAT model in eval mode."""
    header = ("model", "accuracy", "predictions that differ", "codes that differ", "file", "s/epoch")
    rows = [header, *map(_cells, stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def _cells(stage: Stage) -> tuple[str, ...]:
    predictions = codes = "-"
    if stage.report is not None:
        total, outputs = stage.report.total, stage.report.outputs
        predictions = f"{outputs.differing_predictions} of {outputs.predictions}"
        codes = f"{total.differing:,} of {total.codes:,}" + (f", by {total.largest}" if total.differing else "")
    return (
        stage.name,
        f"{stage.accuracy:.2%}",
        predictions,
        codes,
        "-" if stage.file is None else f"{stage.file.stat().st_size / 1000:.1f} kB",
        "-" if stage.seconds_per_epoch is None else f"{stage.seconds_per_epoch:.2f}",
    )


def largest_layer(model: nn.Module) -> tuple[str, QATLayer | FixedPointLayer]:
    """Name and module of the quantized layer with the most weights."""
    kinds = (QATLayer, FixedPointLayer)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    return max(layers, key=lambda item: item[1].weight.numel())
