"""One schedule for everyone, and what the trained and the deployed model get right."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonq
from tritonq.perf.accuracy.data import Split

BATCH = 100


def train(model: nn.Module, data: Split, epochs: int, rate: float, decay: float, seed: int) -> None:
    """Train by SGD with momentum, from ``rate`` to 0 by half a cosine."""
    optimizer = torch.optim.SGD(tritonq.parameter_groups(model, rate, decay), momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(len(data.images) / BATCH), 0
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(data.images), generator=generator), BATCH):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = _loss(model.train()(data.images[chosen]), data.targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.dim() == 1:
        return F.cross_entropy(outputs, targets)
    return F.binary_cross_entropy_with_logits(outputs, targets)


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Return the share of right answers in percent: of images, or with several labels of labels."""
    right = 0.0
    for images, targets in zip(torch.split(data.images, 500), torch.split(data.targets, 500), strict=True):
        outputs = model.eval()(images)
        if targets.dim() == 1:
            right += float((outputs.argmax(1) == targets).sum())
        else:
            right += float(((outputs > 0) == (targets > 0)).float().mean(1).sum())
    return 100 * right / len(data.images)
