"""All weights in one launch are what each weight is by itself."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonq
from op_tester import OpTester, operators
from quantizer_states import QuantizerState, assert_same_state, moved_state, quantizer_state
from tritonq.quantized_type import QINT4, QINT8_NARROW, QUINT8, QuantizedType
from tritonq.reference import weight as reference

SHAPES = [(5, 3, 3, 3), (4, 1100), (1, 1), (33, 2, 1, 1), (3, 130)]


def problem(device: str) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return rows, torch.randn(sum(shape[0] for shape in SHAPES), generator=generator)


def states(qtypes: list[QuantizedType], **changes: object) -> list[QuantizerState]:
    """Their ranges and scales lie behind one another, so that whoever writes too far changes a neighbour's."""
    made = [
        quantizer_state(qtype.with_axis(0), shape[0], **changes) for qtype, shape in zip(qtypes, SHAPES, strict=True)
    ]
    counts = [shape[0] for shape in SHAPES]
    low, high, scale = (
        torch.cat([getattr(state[part], name) for state in made]).split(counts)
        for part, name in ((1, "min_val"), (1, "max_val"), (0, "scale"))
    )
    return [state.with_range(min_val=low[i], max_val=high[i]).with_grid(scale=scale[i]) for i, state in enumerate(made)]


def assert_as_each_by_itself(mine: list[QuantizerState], others: list[QuantizerState], use: str, device: str) -> None:
    """Quantize the weights of ``problem`` together with ``mine``: equal to each with its own of ``others``."""
    rows, fold = problem(device)
    found = operators("weights_together", use).quantize_all(
        [weight.to(device) for weight in rows], fold.to(device), *zip(*mine, strict=True)
    )
    folds = fold.split([len(weight) for weight in rows])
    for weight, of_one, own, other, (codes, unit, _, _) in zip(rows, folds, mine, others, found, strict=True):
        expected = reference.quantize_folded(weight, of_one, *other)
        assert torch.equal(codes.cpu(), expected.codes)
        assert torch.equal(unit.cpu(), expected.unit)
        assert_same_state(own, other)


class TestWeightsTogether(OpTester):
    @pytest.mark.parametrize(
        "qtypes",
        [[QINT8_NARROW] * 5, [QUINT8] * 5, [QINT8_NARROW, QUINT8, QINT8_NARROW, QINT4, QUINT8]],
        ids=["narrow", "affine", "mixed"],
    )
    def test_equals_each_weight_by_itself(self, qtypes: list[QuantizedType], use: str, device: str) -> None:
        mine, others = states(qtypes, device=device, averaging=0.3), states(qtypes, averaging=0.3)
        rows, fold = problem(device)
        rows[0][1, 0, 0, 0] = torch.nan
        for factor in (1.0, 0.5):
            found = operators("weights_together", use).quantize_all(
                [weight.to(device) for weight in rows], factor * fold.to(device), *zip(*mine, strict=True)
            )
            folds = (factor * fold).split([len(weight) for weight in rows])
            for weight, of_one, own, other, (codes, unit, _, frozen) in zip(
                rows, folds, mine, others, found, strict=True
            ):
                expected = reference.quantize_folded(weight, of_one, *other)
                assert torch.equal(codes.cpu().nan_to_num(99), expected.codes.nan_to_num(99))
                assert torch.equal(unit.cpu(), expected.unit)
                assert_same_state(own, other)
                assert torch.equal(frozen.scale.cpu(), other.grid.scale)
                if other.grid.zero_point is not None:
                    assert torch.equal(frozen.zero_point.cpu(), other.grid.zero_point)

    @pytest.mark.parametrize("switch", ["observing", "active"])
    def test_switches(self, switch: str, use: str, device: str) -> None:
        off, qtypes = {switch: False}, [QINT8_NARROW, QINT4, QINT4, QINT8_NARROW, QINT4]
        mine, others = states(qtypes, device=device, **off), states(qtypes, **off)
        assert_as_each_by_itself(mine, others, use, device)

    def test_without_switches_everything_is_on(self, use: str, device: str) -> None:
        mine, others = states([QINT8_NARROW] * 5, device=device), states([QINT8_NARROW] * 5)
        mine, others = (
            [of.with_range(enabled=None).with_grid(enabled=None) for of in every] for every in (mine, others)
        )
        assert_as_each_by_itself(mine, others, use, device)

    def test_grids_that_do_not_observe(self, use: str, device: str) -> None:
        fixed = [
            state.with_range(frozen=True, has_data=True)
            for state in states([QINT8_NARROW, QINT4, QUINT8, QINT8_NARROW, QINT4], device=device)
        ]
        rows, fold = problem(device)
        fold *= 10  # beyond the codes of four bits
        found = operators("weights_together", use).quantize_all(
            [weight.to(device) for weight in rows], fold.to(device), *zip(*fixed, strict=True)
        )
        folds = fold.split([len(weight) for weight in rows])
        for weight, of_one, state, (codes, _, _, _) in zip(rows, folds, fixed, found, strict=True):
            expected = reference.quantize_folded(weight, of_one, *moved_state(state, "cpu"))
            assert torch.equal(codes.cpu(), expected.codes)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8, eps=1e-3)),
        *(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 4 * 4, 5)),
    )
    model = tritonq.prepare_qat(model, example_inputs=torch.randn(2, 3, 6, 6)).train()
    model[5].bn.weight = model[5].bn.bias = None
    return model


def train(model: nn.Module, steps: int = 3, checkpointed: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().mean().backward()
        optimizer.step()


def assert_same_model(mine: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for name, value in mine.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often which of the two kernels was launched."""
    from tritonq.kernels.cached_launch import Launcher

    found: Counter[str] = Counter()
    launch = Launcher._launch

    def counted(self: Launcher, *args: object, **constants: object) -> None:
        found[self.function.__name__] += 1
        launch(self, *args, **constants)

    monkeypatch.setattr(Launcher, "_launch", counted)
    return found


@pytest.mark.interpreter
class TestModel:
    def test_trains_to_the_same_bits_with_one_launch_per_step(self, launches: Counter[str]) -> None:
        mine, other = network(), network()
        handle = tritonq.quantize_weights_together(mine)
        launches.clear()
        train(mine)
        assert launches["quantize_all_kernel"] == 3
        forward_and_backward = launches["quantize_folded_kernel"]
        launches.clear()
        train(other)
        assert launches["quantize_folded_kernel"] == forward_and_backward + 9
        assert_same_model(mine, other)
        handle.remove()
        launches.clear()
        train(mine, 1)
        assert launches["quantize_all_kernel"] == 0

    def test_a_checkpointed_step_is_the_same_step(self, launches: Counter[str]) -> None:
        mine, other = network(), network()
        tritonq.quantize_weights_together(mine)
        train(mine, checkpointed=True)
        train(other)
        assert launches["quantize_all_kernel"] == 3
        assert_same_model(mine, other)

    def test_a_weight_that_changed_after_it_was_made_ready_is_quantized_again(self) -> None:
        mine, other = network(), network()
        for model in (mine, other):
            model[0].weight_fake_quant.disable_observer()
        tritonq.quantize_weights_together(mine)
        x = torch.randn(4, 3, 6, 6)
        with torch.no_grad():
            # A call that stops behind the hook leaves everything ready.
            stop = mine[0].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mine(x)
            stop.remove()
            assert mine[0].step_memory.ready is not None
            assert copy.deepcopy(mine)[0].step_memory.ready is None
            for model in (mine, other):
                model[0].weight.mul_(1.5)
                model.train()
            assert torch.equal(mine[0](x), other[0](x))
        assert mine[0].step_memory.ready is None

    def test_layers_that_need_modules_of_their_own_keep_them(self, launches: Counter[str]) -> None:
        mine, other = network(), network()
        for model in (mine, other):
            model[0].mode = "exact"
            model[3].freeze_bn_stats()
        tritonq.quantize_weights_together(mine)
        train(mine)
        train(other)
        assert_same_model(mine, other)
        assert mine[0].step_memory.ready is None
        assert mine[3].step_memory.ready is None
        launches.clear()
        mine.eval()(torch.randn(1, 3, 6, 6))
        assert launches["quantize_all_kernel"] == 0


def test_on_a_device_without_kernels_nothing_changes():
    mine, other = network(), network()
    tritonq.quantize_weights_together(mine)
    train(mine)
    train(other)
    assert_same_model(mine, other)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no quantization-aware layer with BatchNorm"):
        tritonq.quantize_weights_together(nn.Sequential(nn.Linear(2, 2)))
