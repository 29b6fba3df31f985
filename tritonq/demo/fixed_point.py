"""The main job in fixed point: fine-tune with 8-bit multiplications only, convert to integers, export, compare."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tritonq.cli.training_files import save_training
from tritonq.demo.model import SmallResNet
from tritonq.demo.picture import draw, widest_channel
from tritonq.demo.run import (
    FLOAT_LEARNING_RATE,
    Files,
    Result,
    Stage,
    announce,
    demo_recipe,
    largest_layer,
    load_images,
    onnx_logits,
)
from tritonq.demo.training import accuracy, logits, train
from tritonq.deploy import convert, export_onnx, save_converted, verify
from tritonq.prepare import prepare_qat
from tritonq.qconfig import get_qconfig

_LEARNING_RATE = 0.01
# The first of these images give the input's initial fractional length.
_EXAMPLES = 64


def run(arguments: argparse.Namespace) -> Result:
    """Train in float, fine-tune in fixed point, convert, save, export, compare, draw."""
    data = load_images(arguments)
    announce(data)
    files = Files.inside(arguments.output, "f8net")

    torch.manual_seed(arguments.seed)
    model = SmallResNet(data.train_images.shape[1], len(data.classes))
    float_run = train(
        model, data, epochs=arguments.epochs, learning_rate=FLOAT_LEARNING_RATE, label="float", seed=arguments.seed
    )
    torch.save(model.state_dict(), files.float_model)

    qconfig = get_qconfig("f8net")
    trained = prepare_qat(model, qconfig=qconfig, example_inputs=data.train_images[:_EXAMPLES])
    fixed_run = train(
        trained,
        data,
        epochs=arguments.qat_epochs,
        learning_rate=_LEARNING_RATE,
        label="fixed point",
        seed=arguments.seed,
    )
    save_training(files.qat_model, demo_recipe(qconfig, data), {"state_dict": trained.state_dict()})
    integers = convert(trained)
    save_converted(integers, files.converted)
    export_onnx(integers, files.onnx, data.train_images[:2])
    name, layer = largest_layer(trained)
    draw(files.picture, float_run, fixed_run, name, widest_channel(layer))

    def score(outputs: Tensor) -> float:
        return accuracy(outputs, data.test_labels)

    images = data.test_images
    stages = (
        Stage("float", score(logits(model, images)), files.float_model, float_run.seconds_per_epoch),
        Stage("fixed point (eval)", score(logits(trained, images)), None, fixed_run.seconds_per_epoch),
        Stage("integers", score(logits(integers, images)), files.converted, report=verify(trained, integers, images)),
        Stage(
            "ONNX Runtime",
            score(onnx_logits(files.onnx, images)),
            files.onnx,
            report=verify(trained, files.onnx, images),
        ),
    )
    # Integers are integers everywhere.
    return Result(stages, files)
