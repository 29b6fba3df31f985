"""The main job in fixed point: fine-tune with 8-bit multiplications only, convert to integers, export, compare."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tritonq.cli.data import load_digits, load_folder
from tritonq.demo.model import SmallResNet
from tritonq.demo.run import FLOAT_LEARNING_RATE, Stage, onnx_logits, table
from tritonq.demo.training import accuracy, logits, train
from tritonq.deploy import convert
from tritonq.deploy.fixed_point_onnx import export_fixed_point_onnx
from tritonq.deploy.fixed_point_verify import compare_outputs, verify_fixed_point
from tritonq.deploy.verify import LayerComparison, VerificationReport
from tritonq.prepare import prepare_qat
from tritonq.qconfig import get_qconfig

_LEARNING_RATE = 0.01
# The first of these images give the input's initial fractional length.
_EXAMPLES = 64


def main(arguments: argparse.Namespace) -> int:
    """Run the demo with ``--scheme f8net`` and print its table; 0 when no code differs, else 1."""
    stages = run(arguments)
    print(f"\n{table(stages)}\n\nwritten: {', '.join(str(stage.file) for stage in stages if stage.file)}")
    return 0 if all(stage.report is None or stage.report.agrees() for stage in stages) else 1


def run(arguments: argparse.Namespace) -> tuple[Stage, ...]:
    """Train in float, fine-tune in fixed point, convert, export, compare."""
    data = load_digits() if arguments.data is None else load_folder(arguments.data, arguments.image_size)
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = data.test_images, data.test_labels

    torch.manual_seed(0)
    model = SmallResNet(data.train_images.shape[1], len(data.classes))
    float_run = train(model, data, epochs=arguments.epochs, learning_rate=FLOAT_LEARNING_RATE, label="float")
    trained = prepare_qat(model, qconfig=get_qconfig("f8net"), example_inputs=data.train_images[:_EXAMPLES])
    fixed_run = train(trained, data, epochs=arguments.qat_epochs, learning_rate=_LEARNING_RATE, label="fixed point")
    outputs = logits(trained, images)
    integers = convert(trained)
    onnx = folder / "model.f8net.onnx"
    export_fixed_point_onnx(integers, onnx, data.train_images[:2])
    onnx_outputs = onnx_logits(onnx, images)
    # The network's outputs are its last accumulators: equal outputs are equal codes.
    differing = int((outputs != onnx_outputs).sum())
    layer = LayerComparison("output", outputs.numel(), differing, int(differing > 0))
    onnx_report = VerificationReport((layer,), compare_outputs(outputs, onnx_outputs))

    return (
        Stage("float", accuracy(logits(model, images), labels), None, float_run.seconds_per_epoch),
        Stage("fixed point (eval)", accuracy(outputs, labels), None, fixed_run.seconds_per_epoch),
        Stage(
            "integers",
            accuracy(logits(integers, images), labels),
            report=verify_fixed_point(trained, integers, images),
        ),
        Stage("ONNX Runtime", accuracy(onnx_outputs, labels), onnx, report=onnx_report),
    )
