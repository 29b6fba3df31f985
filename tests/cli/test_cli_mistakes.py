"""Everyday mistakes on the command line end in one line, before any image is read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tritonq
from digits_runs import MODEL, train
from image_folders import FOLDER_MODEL, image_folder, train_on
from tritonq.__main__ import main
from tritonq.cli.models import find_qconfig, make_model
from tritonq.cli.paths import held_folder, writable_file

DIGITS = [*MODEL, "--model-arg=in_channels=1"]


def one_line(capsys):
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    return line


def one_class(root):
    return image_folder(root, ("ants",))


def empty_class(root):
    (image_folder(root) / "wasps").mkdir()
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "at least two classes"),
        (empty_class, "wasps holds no images"),
        (lambda root: root, "not a folder"),
    ],
)
def test_folders_that_cannot_be_trained_on(make, message, tmp_path, capsys):
    folder = make(tmp_path / "images")
    assert train_on(folder, tmp_path / "out", "--model-arg=classes=3") == 1
    assert message in capsys.readouterr().err


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train(*DIGITS, "--tensorboard", "--output", tmp_path / "out") == 1
    assert one_line(capsys) == "tritonq train: --tensorboard needs tensorboard: pip install 'tritonq[tensorboard]'"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("sklearn", "tritonq train needs sklearn: pip install 'tritonq[demo]'"),
        ("torchvision", "tritonq train needs torchvision, which is not installed"),
    ],
)
def test_a_package_that_is_imported_late(package, line, tmp_path, monkeypatch, capsys):
    def open_examples(*args, **kwargs):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("tritonq.cli.train.open_examples", open_examples)
    assert train(*DIGITS, "--output", tmp_path / "out") == 1
    assert one_line(capsys) == line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere:f", "digits"], "the module 'nowhere' can't be imported"),
        (["model.py:f", "digits"], "a module is named as in an import, from the folder where it is found: model:f"),
        (["torch:tensro", "digits"], "has no 'tensro'; did you mean 'tensor'"),
        (["torch", "digits"], "module:factory"),
        (["torch:ones", "digits", "--model-arg=size=(3,)"], "object of type Tensor"),
        (["torch.nn:Conv2d", "digits"], "torch.nn:Conv2d() raised TypeError: Conv2d.__init__() missing"),
        (["torch.nn:Conv2d", "digits", "--model-arg", "x"], "KEY=VALUE"),
        ([*MODEL, "--model-arg=in_channels=3"], "rejects images of shape (2, 1, 8, 8)"),
        ([*DIGITS, "--model-arg=classes=3"], "need (2, 10 or more)"),
        ([*DIGITS, "--qconfig=int7"], "known: onnxruntime, tensorrt"),
        ([*DIGITS, "--qconfig=tensort"], "did you mean 'tensorrt'?"),
        ([*DIGITS, "--qconfig=megengine_calibration"], "is for tritonq.calibrate, and rounds nothing"),
        ([*DIGITS, "--qconfig=megengine_passive"], "observes nothing: a program has to give"),
        ([*DIGITS, "--qconfig=none.json"], "none.json can't be read"),
        ([*DIGITS, "--epochs=2", "--frozen-epochs=2"], "of 2 epochs fewer can be frozen"),
        ([*DIGITS, "--batch-size=1"], "batch size must be at least 2"),
        ([*DIGITS, "--workers=-1"], "workers must be at least 0"),
        ([*DIGITS, "--patience=0"], "patience must be at least 1"),
        ([*DIGITS, "--checkpoint-every=0"], "checkpoint every must be at least 1"),
        ([*DIGITS, f"--seed={10**23}"], "seed must have at most 40 bits"),
        ([*DIGITS, "--learning-rate=nan"], "learning rate must be a number from 0"),
        ([*DIGITS, "--validation=1.5"], "lies between 0 and 1, got 1.5"),
        ([*DIGITS, "--validation=photos"], "of the digits a share is held out, such as --validation 0.5, got 'photos'"),
        ([*DIGITS, "--validation=0.9999"], "no image of class '0' is left to train with"),
        ([*DIGITS, "--augment=flop"], "unknown augmentation 'flop'; known: none, flip, crop"),
        ([*DIGITS, "--augment=flip"], "can't be augmented"),
        ([*DIGITS, "--device=gpu"], "'gpu' is no device that torch knows"),
        ([*DIGITS, "--device=cuda:99"], "can't be used here"),
        ([*DIGITS, "--preprocessing=model"], "has no preprocessing of its own"),
        ([*DIGITS, "--mean=0.5"], "--mean and --std go together"),
        ([*DIGITS, "--mean=0,0,0", "--std=1"], "mean has 3 values, images have 1 channels"),
        ([*DIGITS, "--mean=0", "--std=0"], "std must be above 0"),
        ([*DIGITS, "--resize=4"], "--resize is at least --image-size"),
        ([*DIGITS, "--weights=none.pt"], "none.pt can't be read"),
    ],
)
def test_bad_arguments_end_in_one_line(words, message, tmp_path, capsys):
    assert train(*words, "--output", tmp_path) == 1
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "report"])
@pytest.mark.parametrize(
    "words",
    [
        ["nowhere:f"],
        [*FOLDER_MODEL[:-4], f"--validation={Path(__file__).parent}"],
        [*FOLDER_MODEL[:-4], "--qconfig=tensort"],
        [*FOLDER_MODEL[:-4], "--model-arg=width=no"],
        [*FOLDER_MODEL[:-4], "--weights=none.pt"],
    ],
)
def test_typos_are_found_before_an_image_is_read(command, words, tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "ants" / "broken.png").write_bytes(b"no image")
    assert main([command, words[0], str(folder), *words[1:], "--output", str(tmp_path / "out")]) == 1
    assert "broken" not in one_line(capsys)


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert train(*DIGITS, "--output", tmp_path / "file") == 1
    assert one_line(capsys) == f"tritonq train: {tmp_path / 'file'}: Not a directory"
    for target, message in ((tmp_path / "none" / "r.html", "make it first"), (tmp_path, "is a folder")):
        assert main(["report", *DIGITS, "--output", str(target)]) == 1
        assert message in one_line(capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_two_runs_into_one_folder(tmp_path, capsys):
    with held_folder(tmp_path):
        assert train(*DIGITS, "--output", tmp_path) == 1
        told = "another run writes to {} now: wait until it ends, or pass another --output"
        assert one_line(capsys) == f"tritonq train: {told.format(tmp_path)}"
        ready, begins = os.pipe()
        child = os.fork()
        if child == 0:  # as a data loader's worker, which outlives a parent that is killed
            os.write(begins, b"!")
            signal.pause()
        os.read(ready, 1)
    try:
        with held_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert train(*DIGITS, "--output", tmp_path) == 1
    assert "Permission denied" in one_line(capsys)
    tmp_path.chmod(0o700)


def test_ctrl_c_outside_of_training(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **choices):
        raise KeyboardInterrupt

    monkeypatch.setattr("tritonq.cli.train.open_examples", interrupt)
    assert train(*DIGITS, "--output", tmp_path) == 130
    assert one_line(capsys) == "tritonq train: interrupted"


def test_too_little_memory(tmp_path, capsys, monkeypatch):
    def fail(*args, **choices):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore lines")

    monkeypatch.setattr("tritonq.cli.train.open_examples", fail)
    assert train(*DIGITS, "--output", tmp_path) == 1
    assert "smaller batches and images need less: CUDA out of memory" in one_line(capsys)


@pytest.mark.parametrize(
    ("word", "message"), [("trian", "did you mean 'train'?"), ("xyzzy", "(commands: demo, train,")]
)
def test_unknown_commands(word, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word, "--size", "3"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"tritonq {tritonq.__version__}"


def test_bars_are_drawn_on_terminals_alone(tmp_path):
    words = [*DIGITS, "--epochs=1", "--batch-size=449", "--no-onnx", "--output", str(tmp_path / "out")]
    process = subprocess.run([sys.executable, "-m", "tritonq", "train", *words], capture_output=True, check=True)
    assert process.stderr == b""
    assert b"\r" not in process.stdout


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


def test_help_says_enough(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("Example:", "--resume", "tensorrt", "module:factory", "held out", "default 0.005,"):
        assert words.lower() in printed.lower()
    assert "default: None" not in printed


def test_the_demo_s_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "epochs of float training (default: 20)" in printed
    assert "(default: demo-output)" in printed


def test_a_format_that_cannot_be_deployed_is_told_before_training(tmp_path, capsys):
    assert train(*DIGITS, "--qconfig=mxfp8", "--epochs=1", "--batch-size=256", "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    told = printed.index("the run ends with checkpoints, without int8 and ONNX files")
    assert "mxfp8, which has no deployed form" in printed
    assert told < printed.index("epoch 1:")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND; see tritonq --help"),
        (["train"], "the following arguments are required: MODULE:FACTORY, DATA; see tritonq train --help"),
        (["train", *DIGITS, "--epochs=x"], "argument --epochs: invalid int value: 'x'; see tritonq train --help"),
        (["predict", "m.onnx", "x.png", "--crop=centre"], "argument --crop: invalid choice: 'centre'"),
        (["--bogus", "train"], "tritonq: unrecognized arguments: --bogus; see tritonq --help"),
        (["evaluate", "m.onnx", "x", "y"], "tritonq evaluate: unrecognized arguments: y; see tritonq evaluate --help"),
        (
            ["train", *DIGITS, "--lerning-rate=1"],
            "unrecognized arguments: --lerning-rate=1; did you mean '--learning-rate'? See tritonq train --help",
        ),
    ],
)
def test_usage_errors_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in one_line(capsys)


def test_ctrl_c_while_a_command_is_imported(capsys, monkeypatch):
    def interrupt(*args, **choices):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert main(["train", "--help"]) == 130
    assert one_line(capsys) == "tritonq train: interrupted"


@pytest.mark.filterwarnings("default")
def test_warnings_of_a_command_are_one_line(tmp_path, capsys, monkeypatch):
    def warn(*args, **choices):
        warnings.warn("layers stay in\n  float", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("tritonq.cli.train.open_examples", warn)
    assert train(*DIGITS, "--output", tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == ["tritonq: layers stay in float", "tritonq train: enough"]


def test_more_memory_than_there_is(tmp_path, capsys):
    assert train(*DIGITS, "--image-size=100000000", "--output", tmp_path) == 1
    assert "too little memory; smaller batches and images need less" in one_line(capsys)


@pytest.mark.parametrize("option", ["--epochs=0", "--qat-epochs=-1"])
def test_a_demo_without_epochs(option, tmp_path, capsys):
    assert main(["demo", option, "--output", str(tmp_path)]) == 1
    assert f"{option.partition('=')[0][2:].replace('-', ' ')} must be at least 1" in one_line(capsys)


def test_a_read_only_file_system_is_told_of_the_folder(tmp_path, monkeypatch):
    """Which refuses to remove a file that is not there, too."""

    def refuse(*args, **choices):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "tritonq-probe")

    monkeypatch.setattr("tritonq.cli.paths.atomic_file", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"nothing can be written there: '.*'$") as raised:
        writable_file(tmp_path / "model.onnx")
    assert raised.value.filename == str(tmp_path)
