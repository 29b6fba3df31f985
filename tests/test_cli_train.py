"""`python -m tritonq train`: any factory, images good and bad, and runs that are killed go on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import tritonq
from tritonq.__main__ import main
from tritonq.cli.data import load_digits, load_examples, load_folder, stacked
from tritonq.cli.models import Recipe, find_qconfig, make_model, read_training
from tritonq.cli.train import Run, Settings
from tritonq.demo.model import SmallResNet
from tritonq.qconfig_files import mapping_to_data

MODEL = ["tritonq.demo.model:SmallResNet", "digits", *(f"--model-arg={word}" for word in ("classes=10", "width=4"))]
DIGITS = [*MODEL, "--model-arg=in_channels=1", "--batch-size=128", "--epochs=2", "--learning-rate=0.05"]
QCONFIG = mapping_to_data(find_qconfig("tensorrt"))


def train(*words):
    return main(["train", *map(str, words)])


def state_of(folder):
    return read_training(Path(folder) / "last.pt")[1]


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


def test_a_run_ends_with_a_deployed_model(whole, capsys):
    path, checkpoint = whole / "model.int8.pt", whole / "last.pt"
    assert sorted(os.listdir(whole)) == ["last.pt", "model.int8.pt"]
    model = tritonq.load_converted(path, SmallResNet(1, 10, 4))
    made, content = read_training(checkpoint)
    assert content["step"] == 16
    trained = made.prepare()
    trained.load_state_dict(content["state_dict"])
    images = load_digits().test_images
    assert torch.equal(model(images), trained.eval()(images))
    assert trained.stem[0].freeze_bn


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
            cwd=Path(__file__).parent.parent,
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
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model.int8.pt"]
    assert_same_run(whole, tmp_path)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    before = state_of(whole)["state_dict"]
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", whole) == 0
    after = state_of(whole)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--frozen-epochs=1", "--learning-rate=0.1"], "its learning_rate is 0.05, not 0.1"),
        (["--resume", "--frozen-epochs=1", "--qconfig=megengine_ema"], "its qconfig is"),
        (["--resume", "--frozen-epochs=1", "--model-arg=width=8"], "its model_arguments is"),
        ([], "pass --resume to go on from it"),
    ],
)
def test_another_run_is_refused(whole, words, message, capsys):
    assert train(*DIGITS, "--output", whole, *words) == 1
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(whole, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes((whole / "last.pt").read_bytes()[:-1000])
    assert train(*DIGITS, "--frozen-epochs=1", "--resume", "--output", tmp_path) == 1
    assert "last.pt can't be read" in capsys.readouterr().err


def test_amp_is_on():
    made = Recipe("tritonq.demo.model:SmallResNet", ("in_channels=1", "classes=10", "width=4"), QCONFIG, 1, 8)
    run = Run(made, Settings("digits", 1, 0, 256, 0.01, 0, "bfloat16"), load_examples("digits"), Path("unused"))
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
    assert isinstance(made.prepare().head, nn.Linear)
    assert torch.equal(content["state_dict"]["head.weight"], weights.head.weight)


def test_weights_of_another_architecture(tmp_path, capsys):
    torch.save(SmallResNet(1, 10, 8).state_dict(), tmp_path / "wide.pt")
    assert train(*DIGITS, "--weights", tmp_path / "wide.pt", "--output", tmp_path / "out") == 1
    assert "is of another architecture: 'stem.0.weight' has shape (8, 1, 3, 3) there" in capsys.readouterr().err


def image_folder(root, classes=("ants", "bees"), count=6):
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = torch.randint(0, 120, (9, 7, 3), generator=generator, dtype=torch.uint8) + 100 * label
            Image.fromarray(pixels.numpy()).save(root / name / f"{k}.png")
    return root


FOLDER = ["--model-arg=in_channels=3", "--model-arg=classes=2", "--model-arg=width=4", "--image-size=8", "--epochs=1"]


def test_a_folder_with_a_corrupt_file(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "bees" / "broken.png").write_bytes(b"no image")
    (folder / "ants" / "cut.png").write_bytes((folder / "ants" / "0.png").read_bytes()[:90])
    words = ["tritonq.demo.model:SmallResNet", folder, *FOLDER, "--batch-size=4", "--output", tmp_path / "out"]
    assert train(*words) == 0
    printed = capsys.readouterr().err
    assert "broken.png" in printed
    assert "cut.png" in printed
    assert "2 files skipped, 12 images read" in printed


def test_a_folder_is_read_as_it_is_needed(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "insects")
    whole, lazy = load_folder(folder, 8), load_examples(str(folder), 8)
    for one, images, labels in (
        (lazy.train, whole.train_images, whole.train_labels),
        (lazy.test, whole.test_images, whole.test_labels),
    ):
        assert [one[i][1] for i in range(len(one))] == labels.tolist()
        assert torch.equal(torch.stack([one[i][0] for i in range(len(one))]), images)
    assert abs(float(whole.train_images.mean())) < 1e-6
    assert abs(float(whole.train_images.std()) - 1) < 1e-6
    held = [value for value in vars(lazy.train).values() if isinstance(value, torch.Tensor)]
    assert not held
    assert lazy.classes == whole.classes
    with pytest.raises(ValueError, match="has 3 channels, which are not 1"):
        load_examples(str(folder), 8, 1)


def test_reading_batches_draws_nothing_from_the_training_s_random_numbers():
    made = Recipe("tritonq.demo.model:SmallResNet", ("in_channels=1", "classes=10", "width=4"), QCONFIG, 1, 8)
    run = Run(made, Settings("digits", 1, 0, 256, 0.01, 0, "off"), load_examples("digits"), Path("unused"))
    before = torch.get_rng_state()
    assert sum(len(labels) for _, labels in run._batches(0)) == 898
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_same_bits(tmp_path):
    folder = image_folder(tmp_path / "insects")
    words = ["tritonq.demo.model:SmallResNet", folder, *FOLDER, "--batch-size=4"]
    assert train(*words, "--output", tmp_path / "here") == 0
    assert train(*words, "--workers=2", "--output", tmp_path / "there") == 0
    assert_same_run(tmp_path / "here", tmp_path / "there")


def one_class(root):
    return image_folder(root, ("ants",))


def empty_class(root):
    (image_folder(root) / "wasps").mkdir()
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "holds 1 class folders"),
        (empty_class, "wasps holds 0 readable"),
        (lambda root: root, "not a folder"),
    ],
)
def test_folders_that_cannot_be_trained_on(make, message, tmp_path, capsys):
    folder = make(tmp_path / "images")
    assert train("tritonq.demo.model:SmallResNet", folder, *FOLDER, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere:f", "digits"], "the module 'nowhere' of 'nowhere:f' can't be imported"),
        (["torch:f", "digits"], "the module 'torch' has no 'f'"),
        (["torch", "digits"], "module:factory"),
        (["torch:ones", "digits", "--model-arg=size=(3,)"], "made a Tensor"),
        (["torch.nn:Conv2d", "digits"], "refuses its arguments (none)"),
        (["torch.nn:Conv2d", "digits", "--model-arg", "x"], "KEY=VALUE"),
        ([*MODEL, "--model-arg=in_channels=3"], "rejects example_inputs"),
        ([*DIGITS, "--model-arg=classes=3"], "needs (2, 10 or more)"),
        ([*DIGITS, "--qconfig=int7"], "known: tensorrt"),
        ([*DIGITS, "--qconfig=none.json"], "none.json can't be read"),
        ([*DIGITS, "--frozen-epochs=2"], "of 2 epochs fewer can be frozen"),
        ([*DIGITS, "--batch-size=1"], "batch size must be at least 2"),
        ([*DIGITS, "--workers=-1"], "workers must be at least 0"),
    ],
)
def test_bad_arguments_end_in_one_line(words, message, tmp_path, capsys):
    assert train(*words, "--output", tmp_path) == 1
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_channels_and_size_of_digits():
    images, labels = stacked(load_examples("digits", 12, 3).train)
    assert images.shape[1:] == (3, 12, 12)
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(labels, load_digits().train_labels)
    with pytest.raises(ValueError, match="not 2"):
        load_digits().with_channels(3).with_channels(2)


def test_names_of_qconfigs():
    expected = tritonq.get_default_qat_qconfig("fbgemm", 0)
    assert find_qconfig("fbgemm-v0").global_rule.qconfig == expected
    assert find_qconfig("qnnpack").global_rule.qconfig == tritonq.get_default_qat_qconfig("qnnpack", 1)


def test_factories_of_the_working_directory_and_methods(tmp_path, monkeypatch):
    (tmp_path / "my_models_for_this_test.py").write_text(
        "from torch import nn\nclass Zoo:\n    @staticmethod\n    def small(width='wide'):\n"
        "        return nn.Linear(2, 3 if width == 'wide' else 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert make_model("my_models_for_this_test:Zoo.small").out_features == 3
    assert make_model("my_models_for_this_test:Zoo.small", ["width=narrow"]).out_features == 4


def test_a_module_that_fails_when_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "my_broken_models_for_this_test.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="can't be imported: RuntimeError: operator nms does not exist"):
        make_model("my_broken_models_for_this_test:small")


def test_help_says_enough(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("Example:", "--resume", "tensorrt", "module:factory", "held out"):
        assert words.lower() in printed.lower()
