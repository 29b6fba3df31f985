"""Quantization-aware training of a user's classifier, from its factory to the deployed file."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tritonq.cli.data import DIGITS, load_examples
from tritonq.cli.evaluation import first_tensor, logits, share_right
from tritonq.cli.folder import Examples, LabelledImages
from tritonq.cli.models import Recipe, add_model_arguments, load_state, read_training, recipe, save_training
from tritonq.deploy import convert, save_converted, verify
from tritonq.deploy.files import remove_leftovers
from tritonq.prepare import disable_observer, freeze_bn_stats
from tritonq.report.summary import summary

_AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Reading a loss waits for the device: the progress bar does it once in so many steps.
_STEPS_PER_DISPLAY = 10
_BATCH_OF_EVALUATION = 256


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, besides the model: a resumed run must have the same."""

    data: str
    epochs: int
    frozen_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    amp: str

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("frozen_epochs", 0), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(self, name)}")
        if self.frozen_epochs >= self.epochs:
            raise ValueError(f"of {self.epochs} epochs fewer can be frozen, got {self.frozen_epochs}")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Half a cosine from the learning rate to 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tritonq train``."""
    parser.epilog = (
        "Example: python -m tritonq train torchvision.models:resnet18 photos --model-arg num_classes=5 "
        "--weights resnet18.pt --image-size 96. Without --weights, training begins with what the factory gives. Files "
        "are read when they are needed; every second one of each class is held out. A run that was interrupted goes on "
        "with --resume, from its last complete checkpoint, to the same bits."
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="what makes the float model, importable from here")
    parser.add_argument("data", metavar="DATA", help=f'a folder with one sub-folder of images per class, or "{DIGITS}"')
    add_model_arguments(parser)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state dict of the trained float model")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--frozen-epochs",
        type=int,
        metavar="N",
        help="last epochs, trained on the ranges and statistics that will be deployed; default a quarter",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read images ahead; default 0: this one"
    )
    parser.add_argument("--learning-rate", type=float, default=0.005, metavar="X", help="at the start; default 0.005")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of images and of dropout; default 0"
    )
    parser.add_argument(
        "--amp", choices=list(_AMP), default="off", help="autocast; float16 scales gradients; default off"
    )
    parser.add_argument("--device", metavar="NAME", help="default cuda where there is one, else cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("train-output"), metavar="DIR", help="where files go; default train-output"
    )
    parser.add_argument("--resume", action="store_true", help="go on from DIR/last.pt, or begin where there is none")
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="write DIR/last.pt so often; default once per epoch"
    )


def main(arguments: argparse.Namespace) -> int:
    """Train, convert, verify, and print how each form of the model does; 0 when the converted model agrees."""
    frozen = arguments.epochs // 4 if arguments.frozen_epochs is None else arguments.frozen_epochs
    settings = Settings(
        arguments.data,
        arguments.epochs,
        frozen,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.seed,
        arguments.amp,
    )
    if arguments.workers < 0:
        raise ValueError(f"workers must be at least 0, got {arguments.workers}")
    data = load_examples(arguments.data, arguments.image_size, arguments.channels)
    made = recipe(arguments, data.train[0][0].shape)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path, device = arguments.output / "last.pt", _device(arguments.device)
    run = Run(made, settings, data, path, device, arguments.weights, arguments.workers)
    if arguments.resume and run.path.exists():
        print(f"resuming at step {run.resume()} of {run.steps}", flush=True)
    elif run.path.exists():
        raise ValueError(f"{run.path} exists: pass --resume to go on from it, or another --output")
    print(str(summary(run.model)).splitlines()[-1], flush=True)
    run.train(arguments.checkpoint_every or run.steps_per_epoch)
    return _deploy(run.model.cpu(), data, arguments.output, arguments.workers)


class Run:
    """One training run: everything that a checkpoint must hold for it to go on as if it had not stopped."""

    def __init__(
        self,
        made: Recipe,
        settings: Settings,
        data: Examples,
        path: Path,
        device: torch.device | None = None,
        weights: Path | None = None,
        workers: int = 0,
    ) -> None:
        self.made, self.settings, self.data, self.path, self.workers = made, settings, data, path, workers
        self.device = torch.device("cpu") if device is None else device
        torch.manual_seed(settings.seed)
        self.model = made.prepare(weights).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        scales = settings.amp == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.step = 0
        # A last batch of one image has no statistics: it is left out, another one each epoch.
        count = len(data.train)
        self.steps_per_epoch = max(1, count // settings.batch_size + (count % settings.batch_size > 1))
        self.steps = settings.epochs * self.steps_per_epoch
        self._check_classes()

    def _check_classes(self) -> None:
        classes = len(self.data.classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantizers that have observed nothing say so
            images = torch.stack([self.data.test[index][0] for index in range(2)])
            answers = logits(self.model, images).shape
        if len(answers) != 2 or answers[1] < classes:
            raise ValueError(
                f"{self.made.model} returns {tuple(answers)} for two images; {self.data.name} needs (2, {classes} or "
                "more): pass the number of classes with --model-arg"
            )

    def train(self, checkpoint_every: int, after_step: Callable[[int], None] | None = None) -> None:
        """Train what is left; ``after_step`` is called with the number of steps done."""
        remove_leftovers(self.path)
        with tqdm(total=self.steps, initial=self.step, desc="QAT", unit="step") as progress:
            while self.step < self.steps:
                epoch = self.step // self.steps_per_epoch
                for images, labels in self._batches(epoch):
                    loss = self._train_step(images, labels)
                    self.step += 1
                    if self.step % checkpoint_every == 0 or self.step == self.steps:
                        self.save()
                    if self.step % _STEPS_PER_DISPLAY == 0 or self.step == self.steps:
                        progress.set_postfix(epoch=epoch + 1, loss=f"{float(loss):.4f}")
                    progress.update()
                    if after_step is not None:
                        after_step(self.step)

    def _batches(self, epoch: int) -> DataLoader[tuple[Tensor, int]]:
        """The batches of an epoch that are still to come."""
        chunks = torch.split(self._order(epoch), self.settings.batch_size)[: self.steps_per_epoch]
        left = [chunk.tolist() for chunk in chunks[self.step % self.steps_per_epoch :]]
        return _loader(self.data.train, left, self.workers, self.device)

    def _order(self, epoch: int) -> Tensor:
        """The order of images in an epoch: a function of seed and epoch alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data.train), generator=generator)

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        if self.step == (settings.epochs - settings.frozen_epochs) * self.steps_per_epoch:
            disable_observer(self.model)
            freeze_bn_stats(self.model)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(self.step, self.steps)
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        dtype = _AMP[settings.amp]
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            loss = F.cross_entropy(first_tensor(self.model(images)).float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def save(self) -> None:
        """Write the checkpoint."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }
        save_training(self.path, self.made, state)

    def resume(self) -> int:
        """Take up the checkpoint's state; returns its step.

        Raises:
            ValueError: a damaged checkpoint, one of another run or of another architecture.
        """
        made, content = read_training(self.path)
        for name, mine, saved in _pairs(self.made, self.settings, made, content.get("settings")):
            if mine != saved:
                raise ValueError(f"{self.path} is of another run: its {name} is {saved!r}, not {mine!r}")
        load_state(self.model, content["state_dict"], str(self.path))
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"]["cpu"])
        if content["random"]["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["random"]["cuda"], self.device)
        self.step = int(content["step"])
        return self.step


def _pairs(made: Recipe, settings: Settings, saved: Recipe, saved_settings: Any) -> list[tuple[str, Any, Any]]:
    """Name, present value and saved value of everything that must not change."""
    found = saved_settings if isinstance(saved_settings, dict) else {}
    pairs = [(name, value, asdict(saved)[name]) for name, value in asdict(made).items()]
    return pairs + [(name, value, found.get(name)) for name, value in asdict(settings).items()]


def _loader(
    images: LabelledImages, batches: list[list[int]], workers: int, device: torch.device | None = None
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of images, by index. Its own random generator leaves the training's alone."""
    pinned = device is not None and device.type == "cuda"
    return DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=pinned, generator=torch.Generator()
    )


def _deploy(model: nn.Module, data: Examples, output: Path, workers: int) -> int:
    """Convert, save, compare, print."""
    batches = [chunk.tolist() for chunk in torch.split(torch.arange(len(data.test)), _BATCH_OF_EVALUATION)]
    held_out = _loader(data.test, batches, workers)
    trained = share_right(model, held_out)
    converted = convert(model)
    path = output / "model.int8.pt"
    save_converted(converted, path)
    deployed = share_right(converted, held_out)
    report = verify(model, converted, held_out)
    total = report.total
    print(f"QAT model (eval)  {trained:.2%} of {len(data.test)} held-out images right")
    print(f"converted         {deployed:.2%}; {total.differing:,} of {total.codes:,} codes differ")
    print(f"written: {path} ({path.stat().st_size / 1000:.1f} kB), {output / 'last.pt'}")
    return 0 if report.agrees() else 1


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
