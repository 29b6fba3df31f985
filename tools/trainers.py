"""Train a prepared model with trainers of other libraries, average it, deploy it, and write the results as one table.

    python tools/trainers.py                    # all, then TRAINERS.md
    python tools/trainers.py lightning timm     # some; nothing is written

Each trainer gets the same residual network and the same generated images, and keeps an average of the model from before
the first step; Ultralytics' trains a detector by `examples/yolo.py`. `make trainers` builds the environment; see
`tools/trainers-requirements.txt`.
"""

# The libraries that it tries are not in the environment in which types are checked.
# mypy: ignore-errors

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

import tritonq
from markdown_table import markdown_table

TABLE = Path(__file__).resolve().parent.parent / "TRAINERS.md"
YOLO = Path(__file__).resolve().parent.parent / "examples" / "yolo.py"
PACKAGES = ("torch", "lightning", "accelerate", "transformers", "timm", "ultralytics")
EPOCHS, BATCH, CLASSES, RATE, DECAY = 8, 16, 3, 0.02, 0.9


class Network(nn.Module):
    """A residual block between two convolutions; with labels it returns the loss too, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Return scores, or loss and scores."""
        x = self.stem(pixel_values)
        logits = self.head(torch.relu(self.body(x) + x).mean((2, 3)))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise with a bright bar that lies, stands or is missing, and which of the three it is."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    pixels = torch.rand(count, 3, 16, 16, generator=random)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        at = int(torch.randint(2, 12, (), generator=random))
        if label == 0:
            image[:, at : at + 2] += 1
        elif label == 1:
            image[:, :, at : at + 2] += 1
    return pixels, labels


def batches() -> DataLoader[Any]:
    """Return the training data."""
    return DataLoader(TensorDataset(*images(160, 0)), BATCH, shuffle=True, drop_last=True)


def prepared() -> nn.Module:
    """Return the network with quantizers."""
    torch.manual_seed(0)
    return tritonq.prepare_qat(Network(), example_inputs=images(4, 2)[0])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that all trainers use."""
    return torch.optim.SGD(tritonq.parameter_groups(model, RATE, 1e-4), momentum=0.9)


def average_of(model: nn.Module) -> AveragedModel:
    """Return an average (EMA) of the model's parameters and buffers."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)


def lightning(precision: str = "32-true") -> tuple[nn.Module, nn.Module]:
    """Train with Lightning's Trainer and its callback for averages; return the model and its average."""
    import lightning as L
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = prepared()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]).float(), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.network)

    class KeepsBoth(EMAWeightAveraging):
        # Lightning copies the average over the model at the end.
        trained: nn.Module

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.trained = copy.deepcopy(pl_module)
            super().on_train_end(trainer, pl_module)

    module, averaging = Module(), KeepsBoth(decay=DECAY, use_buffers=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(max_epochs=EPOCHS, accelerator="cpu", precision=precision, callbacks=[averaging], **quiet).fit(
        module, batches()
    )
    return averaging.trained.network, module.network


def accelerate(mixed_precision: str = "no") -> tuple[nn.Module, nn.Module]:
    """Train with Accelerate's loop; return the model, as Accelerate wrapped it, and its average."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # it would keep the precision of the first one in a process
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = prepared().train()
    average = average_of(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), batches())
    for _ in range(EPOCHS):
        for x, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x).float(), labels))
            optimizer.step()
            average.update_parameters(accelerator.unwrap_model(model))
    return model, average.module


def transformers() -> tuple[nn.Module, nn.Module]:
    """Train with the Trainer of Hugging Face's transformers; return the model and its average."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Averages(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            average.update_parameters(model)

    model = prepared()
    average = average_of(model)
    pixels, labels = images(160, 0)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        optimizers = (optimizer_of(model), None)
        Trainer(model, arguments, train_dataset=data, optimizers=optimizers, callbacks=[Averages()]).train()
    return model, average.module


def timm() -> tuple[nn.Module, nn.Module]:
    """Train as timm's train.py does, with its optimizer, schedule, loss scaler and ModelEmaV3.

    Return model and average.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    model = prepared().train()
    average = ModelEmaV3(model, decay=DECAY)
    optimizer = create_optimizer_v2(model, "sgd", lr=RATE, weight_decay=1e-4, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, EPOCHS, lr_min=1e-3)
    updates = 0
    for epoch in range(EPOCHS):
        for x, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            updates += 1
            average.update(model, step=updates)
        scheduler.step(epoch + 1)
    return model, average.module


def stochastic_weight_averaging() -> tuple[nn.Module, nn.Module]:
    """Train with torch's SWA, its schedule and its pass for BatchNorm statistics; return the model and its average."""
    model = prepared().train()
    average = AveragedModel(model)
    optimizer = optimizer_of(model)
    schedule = SWALR(optimizer, RATE / 2, anneal_epochs=2)
    for epoch in range(EPOCHS):
        for x, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        if epoch >= EPOCHS // 2:
            average.update_parameters(model)
            schedule.step()
    update_bn(((x,) for x, _ in batches()), average)
    return model, average.module


TRAINERS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "lightning": lightning,
    "lightning, bf16-mixed": lambda: lightning("bf16-mixed"),
    "accelerate": accelerate,
    "accelerate, bf16": lambda: accelerate("bf16"),
    "transformers": transformers,
    "timm": timm,
    "torch, SWA": stochastic_weight_averaging,
}


def accuracy(model: nn.Module) -> float:
    """Return the percentage of new images that the model classifies correctly."""
    x, labels = images(300, 1)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == labels).float().mean())


def ranges(model: nn.Module) -> Iterator[Tensor]:
    """Yield the largest value of each activation's range."""
    for name, buffer in model.named_buffers():
        if name.endswith("activation_post_process.max_val") and buffer.dim() == 0:
            yield buffer


HEAD = ("trainer", "accuracy", "of the average", "ranges moved", "apart", "converted")


def try_trainer(train: Callable[[], tuple[nn.Module, nn.Module]]) -> list[str]:
    """Train by ``train``, convert the model and its average, and return the results as cells of a row of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, average = train()
        cells = [f"{accuracy(model.eval()):.1f}", f"{accuracy(average.eval()):.1f}"]
        deployed = [tritonq.convert(part) for part in (model, average)]
    x = images(64, 3)[0]
    with torch.no_grad():
        differences = [
            float((a(x).float() - b(x).float()).abs().max()) for a, b in zip((model, average), deployed, strict=True)
        ]
    begun = list(ranges(prepared()))
    moved = [bool((a != b).any()) for a, b in zip(ranges(average), begun, strict=True)]
    apart = max(float((a / b - 1).abs()) for a, b in zip(ranges(average), ranges(model), strict=True))
    cells += [f"{sum(moved)}/{len(moved)}", f"{100 * apart:.0f} %", f"{max(differences):.2g}"]
    return cells


# Epochs of Ultralytics' trainer in float, then quantized: enough for the detector to find most of the shapes.
YOLO_EPOCHS = (30, 6)


def try_ultralytics() -> list[str]:
    """Return mAP50 of the float detector, of the quantized average, and of its ONNX file, as text."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = map(str, YOLO_EPOCHS)
        command = [sys.executable, str(YOLO), "--quick", "--folder", folder, "--epochs", *epochs]
        environment = {**os.environ, "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": folder}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    found = [line.rpartition(": ")[2] for line in ended.stdout.splitlines() if line.startswith("mAP50")]
    return found or [f"✗ {(ended.stderr.strip().splitlines() or ['no output'])[-1]}", "", ""]


def main() -> None:
    """Try all trainers, or those that the command line names."""
    rows = {}
    detector = try_ultralytics() if len(sys.argv) == 1 or "ultralytics" in sys.argv[1:] else []
    print("ultralytics", *detector, sep=" | ", flush=True)
    for name, train in TRAINERS.items():
        if len(sys.argv) == 1 or any(word in name for word in sys.argv[1:]):
            try:
                rows[name] = try_trainer(train)
            except Exception as error:
                rows[name] = [f"✗ {type(error).__name__}: {str(error).splitlines()[0]}", *[""] * (len(HEAD) - 2)]
            print(name, *rows[name], sep=" | ", flush=True)
    if len(sys.argv) == 1:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        text = [
            "# Trainers of other people",
            "",
            f"""Written by `make trainers` on {datetime.date.today()}: tritonq {tritonq.__version__}, {versions}.

A small residual network with the preset `onnxruntime` learns to tell generated images of three classes in {EPOCHS}
epochs, and an average of it (EMA with decay {DECAY}, or SWA) is kept from before the first step. Both are converted as
the trainer leaves them. Accuracies are in percent of 300 new images; "ranges moved" counts the average's ranges that
training has moved from those of the example inputs; "apart" is the largest distance of an average's range from the
model's; "converted" is the largest difference between outputs of a converted model and of the quantized one.""",
            "",
            *markdown_table(HEAD, [[name, *row] for name, row in rows.items()]),
            "",
            "Ultralytics' own trainer, loss and EMA train `yolov8n` on generated images of circles and squares for\n"
            f"{YOLO_EPOCHS[0]} epochs in float and {YOLO_EPOCHS[1]} quantized (`examples/yolo.py --quick`). "
            "mAP50 in percent, of the average:",
            "",
            *markdown_table(("trainer", "float", "quantized", "in ONNX Runtime"), [["ultralytics", *detector]]),
        ]
        TABLE.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
