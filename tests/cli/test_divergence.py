"""A loss, gradient or weight that is not finite: training stops, and what is saved is from the step before."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import tritonq
from digits_runs import DIGITS, RECIPE, new_run, state_of, train
from tritonq.cli.checkpoints import read_training
from tritonq.cli.data import open_examples
from tritonq.cli.divergence import DivergenceError, DivergenceWatch
from tritonq.cli.models import prepare
from tritonq.cli.settings import Settings
from tritonq.cli.training_loop import Run, make_optimizer
from tritonq.demo.model import SmallResNet


def finite(folder, name="last.pt"):
    state = read_training(folder / name)[1]["state_dict"]
    return all(torch.isfinite(t).all() for k, t in state.items() if t.is_floating_point() and "_val" not in k)


@pytest.mark.filterwarnings("ignore:one batch took the range")
@pytest.mark.parametrize("amp", ["off", "float16"])
def test_a_loss_that_is_not_finite_stops_the_run(amp, tmp_path, capsys):
    assert train(*DIGITS, "--learning-rate=1e30", "--checkpoint-every=1", "--amp", amp, "--output", tmp_path) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    place = "(: the first layer whose output|, but gradients are not finite: that of) "
    assert re.search(rf"step \d+: the loss is [\w.+]+{place}.*'\w+", line), line
    assert finite(tmp_path)
    kept = state_of(tmp_path)["step"]
    assert kept < 4
    assert line.endswith(f"; {tmp_path / 'last.pt'} holds step {kept}, before it")


class Trap(SmallResNet):
    """Divides by 0 before its second block, from the step on that a test chooses."""

    steps_left = 10**9

    def forward(self, x):
        x = self.down(self.block1(self.stem(x)))
        if self.training:
            type(self).steps_left -= 1
            if type(self).steps_left <= 0:
                x = x / 0
        return self.head(self.pool(self.block2(x)).flatten(1))


def test_weights_stay_those_before_the_step_that_failed(tmp_path, monkeypatch):
    model = prepare(replace(RECIPE, model=f"{__name__}:Trap", model_arguments=RECIPE.model_arguments))
    monkeypatch.setattr(Trap, "steps_left", 3)
    settings = Settings("", 4, 0, 256, 0.01, 0, "off")
    run = Run(RECIPE, model, settings, open_examples("digits", RECIPE.preprocessing), tmp_path)
    batches = iter(run._batches(0))
    for _ in range(2):
        run._train_step(*next(batches))
        run.step += 1
    before = model.head.weight.detach().clone()
    with pytest.raises(DivergenceError, match=r"step 3: the loss is nan: the first layer whose output is .* 'block2"):
        run._train_step(*next(batches))
    assert torch.equal(model.head.weight, before)
    with pytest.raises(DivergenceError, match="; no checkpoint was written"):
        run.train(checkpoint_every=1)
    assert not list(tmp_path.iterdir())


def test_the_layer_that_failed_is_named_in_place_of_its_quantizer():
    images, labels = torch.randn(4, 3), torch.arange(4) % 2
    model = tritonq.prepare_qat(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), example_inputs=images).train()
    model(images)
    nn.init.constant_(model[1].weight, math.nan)
    watch = DivergenceWatch(torch.device("cpu"))
    loss = nn.functional.cross_entropy(model(images), labels)
    watch.note(1, images, labels, loss, model.parameters())
    with pytest.raises(DivergenceError, match="the first layer whose output is not finite is '1'"):
        watch.check(model, lambda model, images, labels: nn.functional.cross_entropy(model(images), labels))


def test_a_step_after_the_one_that_failed_changes_nothing_either():
    """On a GPU it runs before the host learns of the failure."""
    torch.manual_seed(0)
    model, watch = nn.Linear(2, 3), DivergenceWatch(torch.device("cpu"))
    optimizer = make_optimizer(model, 0.1)

    def loss_of(model, images, labels):
        return nn.functional.cross_entropy(model(images), labels)

    before = []
    for step, value in enumerate((1.0, math.nan, 2.0), 1):
        before.append(model.weight.detach().clone())
        images, labels = torch.full((4, 2), value), torch.arange(4) % 3
        optimizer.zero_grad()
        loss = loss_of(model, images, labels)
        loss.backward()
        watch.note(step, images, labels, loss, model.parameters())
        optimizer.found_inf = watch.failed
        optimizer.step()
    assert not torch.equal(before[0], before[1])
    assert torch.equal(before[1], before[2])
    assert torch.equal(before[1], model.weight)
    with pytest.raises(DivergenceError, match="step 2: the loss is nan: its images hold values that are not finite"):
        watch.check(model, loss_of, late=False)


def test_a_weight_that_overflows_is_not_saved(tmp_path):
    run = new_run(tmp_path)
    run.save()
    with torch.no_grad():
        run.model.head.weight[0, 0] = math.inf
    with pytest.raises(DivergenceError, match=r"'head.weight' is not finite"):
        run.save()
    assert finite(tmp_path)
