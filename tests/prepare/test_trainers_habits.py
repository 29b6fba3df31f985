"""What trainers do to models: BatchNorms kept in eval mode, further named arguments, classes that write their state."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from prepared_nets import ThreeLayers
from qat_models import train
from tolerances import SUMS, assert_close
from tritonq import convert, prepare_qat
from tritonq.prepare import disable_fake_quant
from tritonq.prepare.forwards.edited import forward_data

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        # Before the convolution, so that train() reaches it first.
        self.norm, self.conv, self.head = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))))


class KeepsNormInEval(Normalised):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("build", [Normalised, KeepsNormInEval])
def test_a_batch_norm_that_its_model_keeps_in_eval_mode_is_frozen(build):
    torch.manual_seed(0)
    model = build()
    prepared = prepare_qat(model, example_inputs=X)
    disable_fake_quant(prepared)
    for _ in range(2):
        for trained in (prepared, copy.deepcopy(prepared)):
            model.train(), trained.train()
            assert_close(trained(X), copy.deepcopy(model)(X), SUMS)
        model(X)
        assert_close(prepared.conv.bn.running_mean, model.norm.running_mean, SUMS)
        model.eval(), prepared.eval()
        assert_close(prepared(X), model(X), SUMS)
    if build is Normalised:
        model.train(), prepared.train()
        model.norm.eval(), prepared.norm.eval()
        assert_close(prepared(X), model(X), SUMS)


class TakesMore(ThreeLayers):
    def forward(self, x, **options):
        x = F.relu(self.first(x))
        return self.head((x + self.second(x)).mean((2, 3)) * options.get("share", 1))


class TakesMoreByPosition(ThreeLayers):
    def forward(self, x, *options):
        x = F.relu(self.first(x))
        return self.head((x + self.second(x)).mean((2, 3)))


def test_a_forward_takes_arguments_that_it_was_not_recorded_with():
    torch.manual_seed(0)
    prepared = prepare_qat(TakesMore(), example_inputs=X)
    assert forward_data(prepared)["eval"] is not None
    prepared.train()(X, items=3).square().sum().backward()
    prepared.eval()
    assert torch.equal(prepared(X, items=3), prepared(X))
    assert torch.equal(prepared(X, options=3), prepared(X))
    with pytest.warns(UserWarning, match="a number in it changed"):
        assert not torch.equal(prepared(X, share=0), prepared(X))
    converted = convert(prepared)
    assert torch.equal(converted(X, items=3), prepared(X))
    prepared = prepare_qat(TakesMoreByPosition(), example_inputs=X).eval()
    assert torch.equal(prepared(X, 1, 2), prepared(X))


class Power(nn.Module):
    """Makes its state itself, as the layers of einops do, and takes it by being made anew."""

    def __init__(self, exponent):
        super().__init__()
        self.exponent = exponent

    def __getstate__(self):
        return {"exponent": self.exponent}

    def __setstate__(self, state):
        self.__init__(state["exponent"])

    def forward(self, x):
        return (x.abs() + 1).pow(self.exponent)


def test_modules_that_write_their_own_state_keep_their_quantizers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Power(0.5), nn.Conv2d(4, 2, 1))
    prepared = prepare_qat(model, example_inputs=X)
    assert list(prepared[1].named_modules())[1:]
    prepared(X)
    prepared.eval()
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), convert(prepared)):
        assert torch.equal(copied(X), prepared(X))


HOOKS = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": torch.nn.utils.weight_norm,
    "spectral norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("hook", HOOKS)
def test_weights_that_hooks_compute_since_preparation_are_deployed(hook):
    torch.manual_seed(0)
    prepared = prepare_qat(Normalised(), example_inputs=X)
    HOOKS[hook](prepared.conv)
    train(prepared, X)
    prepared(X)  # which computes the weight of the last step
    converted = convert(prepared)
    assert torch.equal(converted(X), prepared(X))
    assert not converted.conv._forward_pre_hooks
    assert prepared.conv._forward_pre_hooks
    if hook == "pruning":
        assert (converted.conv.weight == 0).float().mean() >= 0.5


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bilinear = nn.Conv2d(3, 4, 3), nn.Bilinear(4, 4, 2)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.bilinear(x, x)


def test_what_is_left_in_float_is_told_at_the_line_that_prepares():
    with pytest.warns(UserWarning, match="bilinear: Bilinear has no quantized form") as told:
        prepare_qat(Bilinear(), example_inputs=X)
    assert [warning.filename for warning in told] == [__file__]
