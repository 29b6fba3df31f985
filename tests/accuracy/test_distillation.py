"""Distillation from the float model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from tolerances import FLOAT32, SUMS, assert_close

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def pair(**arguments):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).eval()
    student = tritonq.prepare_qat(copy.deepcopy(teacher), example_inputs=X).train()
    return teacher, student, tritonq.Distillation(student, teacher, **arguments)


def test_it_is_the_formula():
    teacher, student, distillation = pair(features={"2": "2"}, temperature=3.0, feature_weight=0.5)
    outputs = student(X)
    loss = distillation.loss(outputs, X)
    with torch.no_grad():
        wanted = teacher(X).double()
        theirs = teacher[:3](X).double()
    ours = outputs.double()
    p, q = (torch.softmax(z / 3.0, 1) for z in (wanted, ours))
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    student.train()
    features = student[:3](X).double()
    expected = expected + 0.5 * (features - theirs).square().mean() / theirs.square().mean()
    assert_close(loss.double(), expected, SUMS, size=0.01)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert float(student[0].weight.grad.abs().sum()) > 0


def test_training_draws_the_student_to_the_teacher():
    _, student, distillation = pair(features=["2"])
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    losses = []
    for _ in range(15):
        loss = distillation.loss(student(X), X)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_autocast_and_float_outputs():
    _, student, distillation = pair()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation.loss(student(X), X)
    assert loss.dtype == torch.float32
    assert math.isfinite(float(loss.detach()))
    same = pair()[2]
    logits = same.teacher(X).detach()
    assert float(same.loss(logits, X)) == pytest.approx(0, abs=FLOAT32.atol)


def test_positions_are_averaged():
    teacher = nn.Conv2d(3, 4, 1)
    distillation = tritonq.Distillation(copy.deepcopy(teacher), teacher, temperature=1.0)
    z = torch.zeros(6, 4, 5, 5)
    p = torch.softmax(teacher(X), 1)
    expected = F.kl_div(torch.log_softmax(z, 1), p, reduction="none").sum(1).mean()
    torch.testing.assert_close(distillation.loss(z, X), expected)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="the student has no module 'nine'"):
        pair(features=["nine"])
    student = nn.Sequential(nn.Flatten())
    with pytest.raises(ValueError, match="the teacher has no module 'nine'"):
        tritonq.Distillation(student, nn.Flatten(), features={"0": "nine"})
    assert not student[0]._forward_hooks
    with pytest.raises(ValueError, match="temperature must be positive"):
        pair(temperature=0.0)
    with pytest.raises(ValueError, match="feature_weight must not be negative"):
        pair(feature_weight=-1.0)
    with pytest.raises(ValueError, match="its own teacher"):
        tritonq.Distillation(*[nn.Linear(1, 1)] * 2)
    _, student, distillation = pair(features=["2"])
    with pytest.raises(ValueError, match="did not run in training mode"):
        distillation.loss(student.eval()(X), X)
    with pytest.raises(ValueError, match="the student returns"):
        distillation.loss(student(X)[:, :2], X)
    distillation.close()
    assert not student[2]._forward_hooks
