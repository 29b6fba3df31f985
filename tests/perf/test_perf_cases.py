"""Cases of benchmarks: their names and tolerances, and that every implementation gives the same result."""

import pytest
import torch
from torch import nn

from tritonq.perf.case import disagreement
from tritonq.perf.cases import all_cases, conv2d
from tritonq.perf.cases.batch_norm_weight import Problem as BatchNormWeight
from tritonq.perf.cases.fake_quant import Problem
from tritonq.perf.cases.fixed_point import Rounding, Search
from tritonq.perf.cases.input_codes import Problem as InputCodes
from tritonq.perf.cases.int8_conv import Convolution
from tritonq.perf.cases.learned_scale import Problem as LearnedProblem
from tritonq.perf.cases.min_max import Problem as ObserveProblem
from tritonq.perf.cases.train_step import Setting, TrainStep
from tritonq.perf.cases.train_step_peers import ACCELERATED_PEERS, PEERS, Peer
from tritonq.perf.memory import saved_bytes

CPU = torch.device("cpu")
SMALL_CASES = [
    Problem((64, 8), torch.float32, None, False, True).case(quick=True, devices=("cpu",)),
    Problem((4, 8, 6, 6), torch.float32, 1, True, True).case(quick=True, devices=("cpu",)),
    Problem((8, 4, 3, 3), torch.float32, 0, False, True, quant_min=-127).case(quick=True, devices=("cpu",)),
    Problem((4, 8, 6, 6), torch.bfloat16, None, False, False).case(quick=True, devices=("cpu",)),
    ObserveProblem((4, 8, 6, 6), torch.float32, False, True, True).case(quick=True, devices=("cpu",)),
    ObserveProblem((8, 4, 3, 3), torch.float32, True, False, True).case(quick=True, devices=("cpu",)),
    LearnedProblem("lsq", (8, 4, 3, 3), 0).case(quick=True, devices=("cpu",)),
    LearnedProblem("lsq+", (4, 8, 6, 6), None).case(quick=True, devices=("cpu",)),
    LearnedProblem("tqt", (4, 8, 6, 6), 1, torch.bfloat16).case(quick=True, devices=("cpu",)),
    LearnedProblem("pact", (4, 8, 6, 6), None).case(quick=True, devices=("cpu",)),
    Rounding((4, 8, 6, 6), torch.float32, None, True).case(quick=True, devices=("cpu",)),
    Rounding((8, 4, 3, 3), torch.bfloat16, 0, True).case(quick=True, devices=("cpu",)),
    Search((4, 8, 6, 6), torch.float32, signed=False).case(quick=True, devices=("cpu",)),
    Convolution(2, 8, 6, 5, 3).case(quick=True, devices=("cpu",)),
    BatchNormWeight((8, 4, 3, 3)).case(quick=True, devices=("cpu",)),
    InputCodes((4, 3, 5, 5), torch.bfloat16).case(quick=True, devices=("cpu",)),
]


def inputs_of(case, seed=0):
    return case.make_inputs(torch.Generator().manual_seed(seed), CPU)


def test_names_are_unique_and_say_the_family():
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) > 50
    assert all(case.name.startswith(case.family + "/") for case in all_cases())


def test_every_case_has_tritonq_and_a_reason_for_its_tolerance():
    for case in all_cases():
        assert "tritonq" in case.implementations
        assert case.tolerance.reason


def test_quick_cases_run_on_a_cpu():
    assert all("cpu" in case.devices for case in all_cases() if case.quick)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
class TestSmallCases:
    def test_tritonq_and_the_baseline_pass_the_check(self, case):
        for name in ("tritonq", case.baseline):
            inputs = inputs_of(case)
            implementation = case.implementations[name]
            step = implementation.build(inputs)
            assert implementation.check(step, inputs, case.reference(inputs), case.tolerance) is None, name

    def test_the_check_sees_one_code_of_difference(self, case):
        inputs = inputs_of(case)
        expected = case.reference(inputs)
        shifted = tuple(output + (0.02 if output.is_floating_point() else 1) for output in expected)
        assert disagreement(shifted, expected, case.tolerance) is not None

    def test_inputs_are_seeded_and_saturate(self, case):
        first, again, other = inputs_of(case), inputs_of(case), inputs_of(case, seed=1)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


class TestConvolutions:
    CONV = conv2d.Convolution(2, 6, 7, 4, 3)
    OPERATOR = conv2d.Operator(CONV, torch.float32, False, ("cpu",)).case()
    LAYER = conv2d.Layer(CONV, False, ("cpu",)).case()

    @pytest.mark.parametrize("case", [OPERATOR, LAYER], ids=lambda case: case.name)
    def test_tritonq_and_the_baseline_pass_the_check(self, case):
        for name in ("tritonq", case.baseline):
            inputs = inputs_of(case)
            step = case.implementations[name].build(inputs)
            assert disagreement(step(inputs), case.reference(inputs), case.tolerance) is None, name

    def test_the_check_sees_a_missing_tap_and_a_missing_batch_norm(self):
        inputs = inputs_of(self.OPERATOR)
        expected = self.OPERATOR.reference(inputs)
        inputs["weight"][:, :, 0, 0] = 0
        assert disagreement(self.OPERATOR.reference(inputs), expected, self.OPERATOR.tolerance) is not None
        inputs = inputs_of(self.LAYER)
        conv, _, relu = conv2d.Layer(self.CONV, False, ("cpu",)).parts()
        with torch.no_grad():
            assert disagreement((relu(conv(inputs["x"])),), self.LAYER.reference(inputs), self.LAYER.tolerance)

    def test_some_values_are_clipped(self):
        inputs = inputs_of(self.OPERATOR)
        (y,) = self.OPERATOR.reference(inputs)
        assert (y == y.max()).sum() > 1

    def test_what_must_move_and_be_computed(self):
        strided = conv2d.Convolution(2, 6, 7, 4, 3, stride=2, groups=2)
        assert strided.output_elements == 2 * 4 * 4 * 4
        assert strided.operations == 2 * strided.output_elements * 3 * 9
        assert strided.bytes_moved(torch.bfloat16) == 2 * (2 * 6 * 49 + 4 * 3 * 9 + strided.output_elements)


def test_bytes_that_must_move():
    forward = Problem((10, 10), torch.bfloat16, None, False, False).case(quick=False, devices=("cpu",))
    both = Problem((10, 10), torch.float32, None, False, True).case(quick=False, devices=("cpu",))
    assert forward.bytes_moved == 100 * 2 * 2
    assert both.bytes_moved == 100 * 4 * 5


def test_clipping_is_exercised():
    problem = Problem((1000, 10), torch.float32, None, False, True)
    inputs = problem.make_inputs(torch.Generator().manual_seed(0), CPU)
    blocked = int((problem.reference(inputs)[1] == 0).sum())
    assert 20 < blocked < 2000


class TestSavedBytes:
    def test_a_storage_counts_once_and_parameters_never(self):
        weight = torch.nn.Parameter(torch.rand(10, 10))
        x = torch.rand(5, 10, requires_grad=True)

        def step(_):
            y = x @ weight
            z = y.exp()
            (z * z.view(5, 10)).sum().backward()
            return ()

        # x for the weight's gradient; exp saves its result, and the product two views of the same.
        assert saved_bytes(step, {}, [weight]) == x.nbytes + x.nbytes
        assert saved_bytes(step, {}, []) == 2 * x.nbytes + weight.nbytes


class TestPeersOfTrainingSteps:
    def test_each_says_what_it_leaves_out(self):
        case = Setting("resnet18", 2, 32).case()
        for name in PEERS | ACCELERATED_PEERS:
            implementation = case.implementations[name]
            assert implementation.leaves_out
            assert "\n" not in implementation.leaves_out

    def test_a_peer_gets_the_float_model_and_the_images(self):
        setting = Setting("resnet18", 2, 32, channels_last=True)
        received = []

        def make(model, images):
            received.append((model, images))
            return nn.Sequential(model)

        peer = Peer("toy", "toy", make, "everything")
        model = setting.peer_model(peer, CPU)
        ((inner, images),) = received
        assert images.shape == (2, 3, 32, 32)
        assert inner.training
        expected = setting.float_model(CPU).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in inner.state_dict().items())
        assert TrainStep(model, None).last.shape == (10, 512)

    @pytest.mark.parametrize("name", PEERS | ACCELERATED_PEERS)
    def test_a_step_where_it_is_installed(self, name):
        """Trains the model, whatever its results; the check is the benchmark's."""
        case = Setting("resnet18", 4, 64).case()
        pytest.importorskip(case.implementations[name].module)
        inputs = inputs_of(case)
        logits, last, _ = case.implementations[name].build(inputs)(inputs)
        assert logits.shape == (4, 10)
        assert last.isfinite().all()
