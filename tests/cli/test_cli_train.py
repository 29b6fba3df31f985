"""`python -m tritonq train`: any factory, images good and bad, and runs that are killed go on to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tritonq
from digits_runs import DIGITS, FILES, RECIPE, new_run, state_of, train
from tritonq.cli.checkpoints import read_training, recipe_from_data, recipe_to_data, save_training
from tritonq.cli.data import load_digits
from tritonq.cli.models import prepare
from tritonq.demo.model import SmallResNet


def assert_same_run(one, other):
    one, other = state_of(one), state_of(other)
    assert one["step"] == other["step"]
    assert [
        name for name, value in one["state_dict"].items() if not torch.equal(value, other["state_dict"][name])
    ] == []
    momenta = [state["momentum_buffer"] for state in one["optimizer"]["state"].values()]
    others = [state["momentum_buffer"] for state in other["optimizer"]["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, others, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert train(*DIGITS, "--frozen-epochs=1", "--output", folder) == 0
    return folder


def test_a_run_ends_with_a_deployed_model(whole):
    path, checkpoint = whole / "model.int8.pt", whole / "best.pt"
    assert sorted(os.listdir(whole)) == FILES
    model = tritonq.load_converted(path, SmallResNet(1, 10, 4))
    made, content = read_training(checkpoint)
    trained = prepare(made)
    trained.load_state_dict(content["state_dict"])
    data = load_digits()
    assert torch.equal(model(data.test_images), trained.eval()(data.test_images))
    score = float((model(data.test_images).argmax(1) == data.test_labels).float().mean())
    assert score == pytest.approx(content["accuracy"])
    last = state_of(whole)
    assert last["step"] == 16
    assert max(epoch["accuracy"] for epoch in last["history"]) == pytest.approx(score)
    trained.load_state_dict(last["state_dict"])
    assert trained.stem[0].freeze_bn


def test_the_log_has_a_row_per_epoch(whole):
    lines = (whole / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,learning_rate,loss,accuracy"
    assert [line.split(",")[:2] for line in lines[1:]] == [["1", "8"], ["2", "16"]]


def wait_for_step(process, folder, step):
    """Until the run's checkpoint has reached a step, or the run has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "last.pt").exists() and state_of(folder)["step"] >= step:
            return
        time.sleep(0.005)


def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path):
    """Checkpoints at every step, so that the kill falls into writing as often as not."""
    command = [sys.executable, "-m", "tritonq", "train", *DIGITS, "--frozen-epochs=1", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for step in (3, 9):
        process = subprocess.Popen(
            [*command, "--resume", "--checkpoint-every=1"],
            cwd=Path(__file__).parent.parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        wait_for_step(process, tmp_path, step)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output.decode()
        assert state_of(tmp_path)["step"] >= step
        (tmp_path / ".last.pt.leftover").write_bytes(b"half")
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", tmp_path) == 0
    assert sorted(os.listdir(tmp_path)) == FILES
    assert_same_run(whole, tmp_path)
    assert (whole / "log.csv").read_text() == (tmp_path / "log.csv").read_text()


def test_resuming_a_finished_run_changes_nothing(whole):
    before = state_of(whole)["state_dict"]
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", whole) == 0
    after = state_of(whole)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--frozen-epochs=1", "--learning-rate=0.1"], "its learning rate is 0.05, not 0.1"),
        (["--resume", "--frozen-epochs=1", "--qconfig=megengine_ema"], "its qconfig is"),
        (["--resume", "--frozen-epochs=1", "--model-arg=width=8"], "its model arguments is"),
        (["--resume", "--epochs=4", "--frozen-epochs=1", "--batch-size=9"], "of another run: its batch size is"),
        (["--resume", "--frozen-epochs=1", "--seed=7", "--amp=bfloat16"], "; its amp is 'off', not 'bfloat16'"),
        (["--resume", "--epochs=1", "--frozen-epochs=0"], "its epochs is 2, not 1"),
        ([], "pass --resume to go on from it"),
    ],
)
def test_another_run_is_refused_before_an_image_is_read(whole, words, message, capsys):
    assert train(*DIGITS, "--output", whole, *words) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_damaged_checkpoint_is_refused(whole, tmp_path, capsys):
    content = (whole / "last.pt").read_bytes()
    for damaged in (content[:-1000], b""):
        (tmp_path / "last.pt").write_bytes(damaged)
        assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", tmp_path) == 1
        assert "last.pt can't be read" in capsys.readouterr().err


def test_a_checkpoint_of_which_a_bit_flipped_is_refused(whole, tmp_path):
    content = torch.load(whole / "last.pt", weights_only=True)
    content["state_dict"]["head.weight"][0, 0] += 1
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="don't match their checksum"):
        read_training(tmp_path / "last.pt")


def test_a_checkpoint_of_version_1_goes_on(whole, tmp_path, capsys):
    """It had neither checksum, classes nor history; channels and size were all of its preprocessing."""
    content = torch.load(whole / "last.pt", weights_only=True)
    for key in ("sha256", "history", "float_accuracy"):
        del content[key]
    recipe = content["recipe"]
    recipe.update(channels=1, size=8)
    del recipe["preprocessing"], recipe["classes"]
    content["version"], content["random"] = 1, {key: content["random"][0][key] for key in ("cpu", "cuda")}
    content["settings"] = {**content["settings"], "data": "digits"}
    # All parameters were in one group.
    groups = content["optimizer"]["param_groups"]
    content["optimizer"]["param_groups"] = [{**groups[0], "params": [i for group in groups for i in group["params"]]}]
    for key in ("augment", "begin"):
        del content["settings"][key]
    torch.save(content, tmp_path / "last.pt")
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", tmp_path) == 0
    assert "resuming at step 16 of 16" in capsys.readouterr().out


def test_a_setting_that_a_checkpoint_does_not_know_yet_counts_as_its_default(whole, tmp_path, capsys):
    """So a setting that is added later does not end the runs of released versions."""
    made, content = read_training(whole / "last.pt")
    del content["settings"]["augment"]
    save_training(tmp_path / "last.pt", made, content)
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--augment=flip", "--output", tmp_path) == 1
    assert "its augment is 'none', not 'flip'" in capsys.readouterr().err
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", tmp_path) == 0
    assert "resuming at step 16 of 16" in capsys.readouterr().out


def test_fields_that_a_file_does_not_know_yet_get_their_defaults():
    data = recipe_to_data(replace(RECIPE, classes=("a", "b")))
    del data["classes"], data["preprocessing"]["interpolation"]
    assert recipe_from_data(data) == replace(RECIPE, classes=())
    for broken in ({"size": 8}, {"size": "x", "channels": 1}):
        with pytest.raises(ValueError, match=r"preprocessing|invalid literal"):
            recipe_from_data(broken)


def test_a_finished_run_can_be_extended(whole, tmp_path):
    shutil.copy(whole / "last.pt", tmp_path / "last.pt")
    words = [*DIGITS, "--resume", "--epochs=4", "--frozen-epochs=1", "--learning-rate=0.02"]
    assert train(*words, "--output", tmp_path) == 0
    state = state_of(tmp_path)
    assert (state["step"], state["settings"]["begin"]) == (32, 2)
    rates = [epoch["learning_rate"] for epoch in state["history"]]
    assert rates[2] > rates[3] > 0
    assert not torch.equal(state["state_dict"]["head.weight"], state_of(whole)["state_dict"]["head.weight"])
    # Ranges moved again, and were frozen at the end.
    scale = "stem.0.activation_post_process.scale"
    assert not torch.equal(state["state_dict"][scale], state_of(whole)["state_dict"][scale])
    assert not any(v.item() for k, v in state["state_dict"].items() if k.endswith("observer_enabled"))


def test_amp_is_on(tmp_path):
    run = new_run(tmp_path, "bfloat16")
    seen = []
    run.model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    run._train_step(*next(iter(run._batches(0))))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_amp_keeps_scales_in_float32(amp, tmp_path):
    assert train(*DIGITS, "--epochs=1", "--amp", amp, "--output", tmp_path) == 0
    state = state_of(tmp_path)["state_dict"]
    assert {value.dtype for name, value in state.items() if name.endswith("scale")} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point() and value.dim() > 0)


def test_a_qconfig_file_and_float_weights(tmp_path):
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("tensorrt")).set_last_layer(None)
    tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    torch.manual_seed(5)
    weights = SmallResNet(1, 10, 4)
    torch.save({"state_dict": weights.state_dict()}, tmp_path / "float.pt")
    words = ["--qconfig", tmp_path / "q.json", "--weights", tmp_path / "float.pt", "--output", tmp_path, "--epochs=1"]
    assert train(*DIGITS, *words, "--learning-rate=0") == 0
    made, content = read_training(tmp_path / "last.pt")
    assert isinstance(prepare(made).head, nn.Linear)
    assert torch.equal(content["state_dict"]["head.weight"], weights.head.weight)


def test_weights_of_another_architecture(tmp_path, capsys):
    torch.save(SmallResNet(1, 10, 8).state_dict(), tmp_path / "wide.pt")
    assert train(*DIGITS, "--weights", tmp_path / "wide.pt", "--output", tmp_path / "out") == 1
    assert "is of another architecture: 'stem.0.weight' has shape (8, 1, 3, 3) there" in capsys.readouterr().err


def test_reading_batches_draws_nothing_from_the_training_s_random_numbers(tmp_path):
    run = new_run(tmp_path)
    before = torch.get_rng_state()
    assert sum(len(labels) for _, labels in run._batches(0)) == 898
    assert torch.equal(torch.get_rng_state(), before)


def test_patience_ends_a_run_that_gets_no_better(tmp_path, capsys):
    words = [*DIGITS, "--epochs=9", "--frozen-epochs=1", "--learning-rate=0", "--patience=2"]
    assert train(*words, "--output", tmp_path) == 0
    assert "stopped after epoch" in capsys.readouterr().out
    state = state_of(tmp_path)
    assert len(state["history"]) < 9
    assert train(*words, "--resume", "--output", tmp_path) == 0
    assert state_of(tmp_path)["step"] == state["step"]


def test_ctrl_c_leaves_a_checkpoint_of_the_last_whole_step(whole, tmp_path):
    command = [sys.executable, "-m", "tritonq", "train", *DIGITS, "--frozen-epochs=1", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--checkpoint-every=1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    (line,) = errors.strip().splitlines()
    step = state_of(tmp_path)["step"]
    assert line == f"tritonq train: interrupted after step {step} of 16: --resume goes on from there"
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", tmp_path) == 0
    assert_same_run(whole, tmp_path)


def test_a_full_disk_loses_nothing(whole, tmp_path):
    """Files may grow to 40 kB and no further: checkpoints can't be written, and the old one stays whole."""
    shutil.copy(whole / "last.pt", tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    code = (
        "import resource, sys\nfrom tritonq.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\nsys.exit(main(sys.argv[1:]))"
    )
    words = [*DIGITS, "--resume", "--epochs=3", "--frozen-epochs=0", "--output", str(tmp_path)]
    process = subprocess.run([sys.executable, "-c", code, "train", *words], capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stderr
    assert "File too large" in process.stderr.splitlines()[-1]
    assert str(tmp_path / "last.pt") in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".last*"))
