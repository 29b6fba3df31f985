"""The training loop of `tritonq train`; a run that is interrupted at any moment can be resumed to the same bits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tritonq.cli.augment import Augmentation
from tritonq.cli.checkpoints import ModelRecipe, load_state, save_training
from tritonq.cli.classification import Batches, batches_of, count_right, first_tensor, in_order, logits
from tritonq.cli.data import Examples
from tritonq.cli.divergence import DivergenceError, DivergenceWatch, check_finite
from tritonq.cli.image_files import UnreadableImageError
from tritonq.cli.interrupts import Interrupted, Interruptions
from tritonq.cli.messages import in_one_line
from tritonq.cli.processes import Processes
from tritonq.cli.same_run import check_same_run, is_extended, processes_of, read_run, saved_settings, step_among
from tritonq.cli.settings import AMP, Settings
from tritonq.cli.training_log import Epoch, TensorBoard, history_from_data, write_csv
from tritonq.deploy.files import remove_leftovers
from tritonq.distributed import broadcast_statistics, sync_observers
from tritonq.parameter_groups import parameter_groups
from tritonq.prepare import disable_observer, enable_observer, freeze_bn_stats, update_bn_stats

# The progress bar reads a loss, which waits for the device, once in so many steps.
_STEPS_PER_DISPLAY = 10
_WEIGHT_DECAY = 1e-4


class Run:
    """One training run, with everything that a checkpoint must hold so that it goes on as if it had not stopped.

    :meth:`train` trains the steps that are left, by SGD with momentum on the model's device, and writes the files.
    :meth:`resume`, called before :meth:`train`, takes up a run that was interrupted, or extends a finished one.

    Args:
        made: how the model was made.
        model: the prepared model, on the device of the run.
        settings: the numbers that decide the run's results.
        data: images to train with, and images held out to measure the accuracy.
        folder: an existing folder, where ``last.pt``, ``best.pt`` and ``log.csv`` are written.
        workers: number of processes that read images; 0: this one reads them.
        patience: stop after so many epochs without a better accuracy; None: never.
        processes: those that train together; None: this one alone.
        board: a log for TensorBoard; None: none.
        float_accuracy: share of held-out images that the float model has right, for checkpoints; None: not measured.

    Raises:
        ValueError: a batch has fewer than two images for each process, or an augmentation is unknown or not possible.
    """

    def __init__(
        self,
        made: ModelRecipe,
        model: nn.Module,
        settings: Settings,
        data: Examples,
        folder: Path,
        *,
        workers: int = 0,
        patience: int | None = None,
        processes: Processes | None = None,
        board: TensorBoard | None = None,
        float_accuracy: float | None = None,
    ) -> None:
        self.made, self.model, self.settings, self.data, self.folder = made, model, settings, data, folder
        self.workers, self.patience, self.board, self.float_accuracy = workers, patience, board, float_accuracy
        self.processes = Processes() if processes is None else processes
        self.device = next(model.parameters()).device
        self.path, self.best_path = folder / "last.pt", folder / "best.pt"
        self.augmentation = Augmentation.named(settings.augment)
        self.data.train.augmented(self.augmentation, settings.seed)
        self.optimizer = make_optimizer(model, settings.learning_rate)
        scales = settings.amp == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.watch = DivergenceWatch(self.device, scales, self.processes.together)
        self.step = 0
        self.history: list[Epoch] = []
        self.stopped = False
        self.saved_step: int | None = None
        # Reasons why files could not be written, each of which is told once.
        self._told: set[str] = set()
        # Sum of the losses of this epoch's images, on the device.
        self.loss_sum = torch.zeros((), device=self.device)
        settings.check_shares(self.processes.count)
        self.steps_per_epoch = settings.steps_per_epoch(len(data.train), self.processes.count)
        self._parallel = self._wrapped()

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run, those before a resume included, epochs · steps per epoch.

        An epoch has a step for each full batch of all processes together, and one more for the rest if that gives each
        process at least two images or is all there is. ``patience`` may end the run earlier.
        """
        return self.settings.epochs * self.steps_per_epoch

    @property
    def best(self) -> Epoch | None:
        """The epoch with the best accuracy, of equally good ones the last; None before the first epoch has ended."""
        return max(self.history, key=lambda epoch: (epoch.accuracy, epoch.epoch), default=None)

    def train(self, checkpoint_every: int) -> None:
        """Train the steps that are left; write a checkpoint every ``checkpoint_every`` ≥ 1 steps and after each epoch.

        Raises:
            DivergenceError: a loss, parameter, BatchNorm statistic or (float16 excepted) gradient is not finite.
            Interrupted: by SIGINT, SIGTERM or SIGHUP, after a step and its checkpoint, if no other process trains.
            UnreadableImageError: a file can't be read any more. The checkpoint holds all steps before; if the image is
                held out, or several processes train, only those up to the checkpoint before.
            OSError: the checkpoint with which training ends can't be written. For other files a line is printed.
        """
        if self.processes.is_first:
            remove_leftovers(self.path)
            remove_leftovers(self.best_path)
        try:
            self._train(checkpoint_every)
        except DivergenceError as error:
            kept = self._saved()
            remains = f"{kept}, before it" if kept else "no checkpoint was written"
            raise DivergenceError(f"{error}; {remains}") from error
        except UnreadableImageError as error:
            kept = self._saved()
            goes_on = f"{kept}, from which --resume goes on" if kept else "no checkpoint was written"
            raise UnreadableImageError(f"{error}; {goes_on}") from error

    def _saved(self) -> str:
        """Return in words which step the last checkpoint holds; "" if there is no checkpoint."""
        if self.saved_step is not None:
            return f"{self.path} holds step {self.saved_step}"
        # Of several processes the first one alone writes, and knows the step.
        return f"{self.path} holds an earlier step" if self.path.is_file() else ""

    def _train(self, checkpoint_every: int) -> None:
        hidden = None if self.processes.is_first else True
        bar = tqdm(total=self.steps, initial=self.step, desc="QAT", unit="step", leave=False, disable=hidden)
        with bar, Interruptions() as signals:
            while self.step < self.steps and not self.stopped:
                epoch = self.step // self.steps_per_epoch
                for images, labels in self._until_one_vanishes(self._batches(epoch)):
                    loss = self._train_step(images, labels)
                    self.step += 1
                    ends = self.step % self.steps_per_epoch == 0
                    if ends:
                        self._end_epoch(epoch + 1)
                    if ends or self.step % checkpoint_every == 0:
                        self.save(last=self.step == self.steps or self.stopped)
                    if ends:  # after the checkpoint, because what is told may have nowhere to go
                        self._tell(bar, self.history[-1])
                    if not bar.disable and (ends or self.step % _STEPS_PER_DISPLAY == 0):
                        bar.set_postfix(epoch=epoch + 1, loss=f"{float(loss):.4f}")
                    bar.update()
                    if signals.received is not None and not self.processes.together:
                        self._leave(signals.received)

    def _tell(self, bar: tqdm[Any], done: Epoch) -> None:
        if self.processes.is_first:
            as_good = any(epoch.accuracy == done.accuracy for epoch in self.history[:-1])
            best = "as good as the best so far, which it replaces" if as_good else "the best so far"
            bar.write(f"{done} ({best})" if self.best is done else str(done), file=sys.stdout)
            sys.stdout.flush()

    def _until_one_vanishes(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; if a file can't be read any more, write a checkpoint, and raise UnreadableImageError."""
        try:
            yield from batches
        except UnreadableImageError:
            if not self.processes.together:
                self.save(last=True)
            raise

    def _leave(self, number: int) -> None:
        if self.step < self.steps and not self.stopped:
            self.save(last=True)
            raise Interrupted(
                f"interrupted after step {self.step} of {self.steps}: --resume goes on from there", number
            )

    def _batches(self, epoch: int) -> Batches:
        """Return the batches of an epoch that are still to come; of each batch the part of this process."""
        chunks = torch.split(self._order(epoch), self.settings.batch_size)[: self.steps_per_epoch]
        first, step = self.processes.rank, self.processes.count
        left = [chunk[first::step].tolist() for chunk in chunks[self.step % self.steps_per_epoch :]]
        images = self.data.train.augmented(self.augmentation, self._epoch_seed(epoch))
        return batches_of(images, left, self.workers, self.device)

    def _order(self, epoch: int) -> Tensor:
        """Return the order of the images in an epoch, int64 (n,); it follows from seed and epoch alone."""
        generator = torch.Generator().manual_seed(self._epoch_seed(epoch))
        return torch.randperm(len(self.data.train), generator=generator)

    def _epoch_seed(self, epoch: int) -> int:
        return self.settings.seed * 1_000_003 + epoch

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        if self.step == (settings.epochs - settings.frozen_epochs) * self.steps_per_epoch:
            disable_observer(self.model)
            freeze_bn_stats(self.model)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(self.step, self.steps_per_epoch)
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        try:
            loss = self._loss(self._parallel, images, labels)
        except ValueError:  # such as of layers that check their statistics
            check_finite(self.model, self.step)
            raise
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        self.watch.note(self.step + 1, images, labels, loss, self.model.parameters())
        if not self.scaler.is_enabled():
            # A fused optimizer leaves the weights alone where this is 1; a scaler sets it by itself.
            self.optimizer.found_inf = self.watch.failed  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.watch.check(self.model, self._loss)
        self.loss_sum += loss.float() * len(labels)
        return loss

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        dtype = AMP[self.settings.amp]
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return F.cross_entropy(first_tensor(model(images)).float(), labels)

    def _end_epoch(self, number: int) -> None:
        """Measure the accuracy on the held-out images, and add the epoch ``number`` (from 1) to history and logs.

        If it is the best so far, the model is written to ``best.pt``. ``stopped`` is set if ``patience`` is over.
        """
        self.watch.check(self.model, self._loss, late=False)
        if self.processes.together:
            broadcast_statistics(self.model)
            sync_observers(self.model)
        held_out = in_order(self.data.test, self.workers, self.processes.rank, self.processes.count)
        right, count = self.processes.summed(*count_right(lambda images: logits(self.model, images), held_out))
        total = sum(self.processes.gathered(float(self.loss_sum)))
        seen = min(self.steps_per_epoch * self.settings.batch_size, len(self.data.train))
        rate = self.settings.learning_rate_at(self.step - 1, self.steps_per_epoch)
        done = Epoch(number, self.step, rate, total / seen, right / count)
        self.history.append(done)
        self.loss_sum.zero_()
        self.stopped = self._has_waited()
        if self.processes.is_first:
            board = self.board
            if board is not None:
                self._kept(lambda: board.add(done))
            self._kept(lambda: write_csv(self.folder / "log.csv", self.history))
            if self.best is done:
                check_finite(self.model, self.step)
                state = {"step": self.step, "state_dict": self.model.state_dict(), "accuracy": done.accuracy}
                self._kept(lambda: save_training(self.best_path, self.made, state))

    def _has_waited(self) -> bool:
        """Whether the best accuracy is as many epochs ago as ``patience`` allows."""
        if self.patience is None or self.best is None:
            return False
        first_best = next(epoch for epoch in self.history if epoch.accuracy == self.best.accuracy)
        return self.history[-1].epoch - first_best.epoch >= self.patience

    def save(self, last: bool = False) -> None:
        """Write all that :meth:`resume` needs to ``last.pt``; ``last`` tells that no later one will be written.

        That is model recipe, settings, step, history, and the states of model, optimizer, gradient scaler and random
        generators. Every process must call it; the first one writes.

        Raises:
            DivergenceError: loss, gradients, parameters or BatchNorm statistics are not finite; an older file stays.
            OSError: the file can't be written, and ``last`` is True; if it is False, a line is printed instead.
        """
        self.watch.check(self.model, self._loss, late=False)
        check_finite(self.model, self.step)
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        random = self.processes.gathered({"cpu": torch.get_rng_state(), "cuda": cuda, "loss_sum": float(self.loss_sum)})
        if not self.processes.is_first:
            return
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "history": [asdict(epoch) for epoch in self.history],
            "float_accuracy": self.float_accuracy,
        }
        if last:
            save_training(self.path, self.made, state)
        elif not self._kept(lambda: save_training(self.path, self.made, state)):
            return
        self.saved_step = self.step

    def _kept(self, write: Callable[[], object]) -> bool:
        """Write a file that training can do without for now; return whether it was written.

        If it was not, print a line: one for each reason, however often it is tried.
        """
        try:
            write()
        except OSError as error:
            reason = in_one_line(error)
            if reason not in self._told:
                print(f"tritonq train: {reason}; training goes on", file=sys.stderr, flush=True)
                self._told.add(reason)
            return False
        return True

    def resume(self) -> int:
        """Load the state of ``last.pt``, in place; return how many of this run's :attr:`steps` are done.

        A finished run may be given more epochs, in which ranges and BatchNorm statistics are updated again. With
        another number of processes than before, random generators are seeded anew.

        Raises:
            ValueError: no checkpoint, a damaged one, one of another run or architecture, or one whose next batch is too
                small to be shared among the processes; or a finished run gets more frozen epochs than new ones.
        """
        made, content = read_run(self.path)
        saved = saved_settings(content)
        step, finished = int(content["step"]), int(saved.get("epochs", 0))
        begun = self.settings.steps_per_epoch(len(self.data.train), processes_of(content))
        extends = is_extended(content, self.settings.epochs, begun)
        self.settings = replace(self.settings, begin=finished if extends else saved.get("begin", 0))
        check_same_run(self.path, self.made, self.settings, made, content, extends=extends)
        if extends and self.settings.epochs - self.settings.frozen_epochs < finished:
            raise ValueError(f"{finished} epochs are done: of {self.settings.epochs} fewer can be frozen")
        self.step = step_among(step, begun, self.steps_per_epoch)
        load_state(self.model, content["state_dict"], str(self.path))
        if len(content["optimizer"]["param_groups"]) < len(self.optimizer.param_groups):
            self.optimizer = make_optimizer(self.model, self.settings.learning_rate, one_group=True)
        self.optimizer.load_state_dict(content["optimizer"])
        _begin_momentum(self.optimizer)
        self.scaler.load_state_dict(content["scaler"])
        self._resume_random(content["random"])
        self.history = history_from_data(content.get("history", []))
        self.float_accuracy = content.get("float_accuracy", self.float_accuracy)
        self.saved_step = step
        self.stopped = self._has_waited()
        if extends:
            enable_observer(self.model)
            update_bn_stats(self.model)
        return self.step

    def _resume_random(self, states: Any) -> None:
        """Restore generators and ``loss_sum``, saved as a dict a process; with other processes than then, seed anew."""
        states = [states] if isinstance(states, dict) else states
        if len(states) != self.processes.count:
            torch.manual_seed(self._epoch_seed(self.step) + self.processes.rank)
            if self.processes.is_first:
                self.loss_sum.fill_(sum(state.get("loss_sum", 0.0) for state in states))
            return
        state = states[self.processes.rank]
        torch.set_rng_state(state["cpu"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.loss_sum.fill_(state.get("loss_sum", 0.0))

    def _wrapped(self) -> nn.Module:
        if not self.processes.together:
            return self.model
        if self.processes.rank:
            torch.manual_seed(self.settings.seed + self.processes.rank)  # dropout differs from process to process
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=devices)


def make_optimizer(model: nn.Module, learning_rate: float, one_group: bool = False) -> torch.optim.Optimizer:
    """Return fused SGD with Nesterov momentum 0.9, and weight decay 1e-4 except for normalizations and quantizers.

    ``one_group``: these decay, too, in one group of all parameters, as in version 0.1.0, whose runs are resumed so.
    """
    groups = parameter_groups(model, learning_rate, _WEIGHT_DECAY)
    if one_group:
        groups = [{"params": list(model.parameters()), "lr": learning_rate, "weight_decay": _WEIGHT_DECAY}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    _begin_momentum(optimizer)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer fused, and give parameters without a momentum buffer one of zeros, which changes no step.

    A loaded state may have switched fusion off. A fused optimizer that skips its first step would leave the buffer
    undefined.
    """
    for group in optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
