"""The one schedule with which all methods train, and the answers of a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.perf.accuracy.data import Split

BATCH = 100
_EVALUATED_AT_ONCE = 500
# Share of the steps that a search takes, as FracBits has it; the rest trains what it found.
_SEARCH_SHARE = 0.8


def train(
    model: nn.Module,
    data: Split,
    epochs: int,
    rate: float,
    decay: float,
    seed: int,
    further_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    end_search: Callable[[nn.Module], object] | None = None,
) -> None:
    """Train ``model`` in place by SGD with momentum; the learning rate falls from ``rate`` to 0 by half a cosine.

    Args:
        model: a float or a prepared model.
        data: images and targets.
        epochs: how often each image is used.
        rate: learning rate at the start.
        decay: weight decay.
        seed: of the order of images.
        further_loss: from outputs and images to what is added to the loss; None: nothing.
        end_search: changes the model after four fifths of the steps. Then ``further_loss`` ends and momentum begins
            anew. None: nothing changes.
    """
    optimizer = _optimizer(model, rate, decay)
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(len(data.images) / BATCH), 0
    search_ends = None if end_search is None else int(_SEARCH_SHARE * steps)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(data.images), generator=generator), BATCH):
            if end_search is not None and step == search_ends:
                end_search(model)
                optimizer, further_loss = _optimizer(model, rate, decay), None
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            model.train()  # that of exported models returns None
            outputs = model(data.images[chosen])
            loss = loss_of(outputs, data.targets[chosen])
            if further_loss is not None:
                loss = loss + further_loss(outputs, data.images[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def _optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(_groups(model, decay), lr=rate, momentum=0.9, nesterov=True)


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return all parameters in two groups: weights, which decay, and all others, which do not.

    A weight is found by its shape, because each library has classes of its own: it has several values per output
    channel. Biases, BatchNorms and scales have one, or one for all.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if parameter.dim() > 1 and parameter.numel() > len(parameter)]
    held = {id(parameter) for parameter in weights}
    others = [parameter for parameter in trained if id(parameter) not in held]
    return [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy, or with several labels the binary cross entropy."""
    if targets.dim() == 1:
        return F.cross_entropy(outputs, targets)
    return F.binary_cross_entropy_with_logits(outputs, targets)


@torch.no_grad()
def outputs_of(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the outputs for all images, computed in batches; a module is put into eval mode."""
    if isinstance(model, nn.Module):
        model.eval()
    return torch.cat([model(part) for part in torch.split(images, _EVALUATED_AT_ONCE)])


def answers_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the class of each image; with several labels whether each is there (bool)."""
    return outputs.argmax(1) if targets.dim() == 1 else outputs > 0


def score(answers: Tensor, targets: Tensor) -> float:
    """Return the percentage of right answers: of images, or with several labels of labels."""
    right = answers == targets if targets.dim() == 1 else answers == (targets > 0)
    return 100 * float(right.double().mean())


def accuracy(model: nn.Module, data: Split) -> float:
    """Return the percentage of right answers of a model."""
    return score(answers_of(outputs_of(model, data.images), data.targets), data.targets)
