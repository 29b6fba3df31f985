"""Images of every kind, read as the options and the conventions of torchvision and timm say."""

from __future__ import annotations

import argparse
import errno
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from digits_runs import train
from image_folders import image_folder, train_on
from tritonq.cli.augment import Augmentation
from tritonq.cli.checkpoints import read_training
from tritonq.cli.data import class_names, in_memory, load_digits, open_examples, stacked
from tritonq.cli.folder import deal
from tritonq.cli.image_files import UnreadableImageError, decode
from tritonq.cli.preprocessing import (
    Preprocessing,
    add_preprocessing_arguments,
    choose_preprocessing,
    preprocessing_from_data,
    preprocessing_to_data,
)
from tritonq.cli.training_loop import Run
from vision_models import import_torchvision, timm_model

SMALL = Preprocessing(8, 8)


def test_a_folder_with_a_corrupt_file(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "bees" / "broken.png").write_bytes(b"no image")
    (folder / "ants" / "cut.png").write_bytes((folder / "ants" / "0.png").read_bytes()[:90])
    assert train_on(folder, tmp_path / "out") == 0
    printed = capsys.readouterr().err
    assert "broken.png" in printed
    assert "cut.png" in printed
    assert "2 of 14 files skipped" in printed


def test_a_folder_is_read_as_it_is_needed(tmp_path):
    folder = image_folder(tmp_path / "insects")
    lazy = open_examples(str(folder), SMALL)
    whole = in_memory(lazy)
    assert abs(float(whole.train_images.mean())) < 1e-6
    assert abs(float(whole.train_images.std()) - 1) < 1e-6
    assert not [value for value in vars(lazy.train).values() if isinstance(value, torch.Tensor)]
    assert lazy.classes == whole.classes == ("ants", "bees")
    grey = open_examples(str(folder), Preprocessing(8, 8, channels=1))
    assert grey.train[0][0].shape == (1, 8, 8)


def test_a_16_bit_image_keeps_its_range(tmp_path):
    path = tmp_path / "ramp.png"
    Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))).save(path)
    found = Preprocessing(8, 8, interpolation="box").pixels(decode(path))
    assert found.shape == (3, 8, 8)
    assert (found[0, 0] - torch.tensor([14.0, 47, 79, 111, 144, 176, 208, 241])).abs().max() <= 1
    assert torch.equal(found[0], found[2])
    tiff = tmp_path / "ramp.tif"
    Image.open(path).save(tiff)
    assert torch.equal(Preprocessing(8, 8, interpolation="box").pixels(decode(tiff)), found)


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.ones((4, 4), np.float32), "no known range"), (np.full((4, 4), 70_000, np.int32), "no image of 16 bits")],
)
def test_values_without_a_known_range_are_refused(array, message, tmp_path):
    Image.fromarray(array).save(tmp_path / "x.tiff")
    with pytest.raises(UnreadableImageError, match=message):
        decode(tmp_path / "x.tiff")


def test_a_huge_image_is_skipped(tmp_path, capsys, monkeypatch):
    folder = image_folder(tmp_path / "insects")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("1", (100, 100)).save(folder / "ants" / "huge.png")
    Image.new("1", (40, 30)).save(folder / "ants" / "large.png")
    data = open_examples(str(folder), SMALL)
    assert len(data.train) + len(data.test) == 13
    assert "huge.png: too large" in capsys.readouterr().err


def test_hidden_and_nested_folders(tmp_path):
    folder = image_folder(tmp_path / "insects")
    image_folder(folder / ".ipynb_checkpoints", ("x", "y"))
    image_folder(folder / "ants" / "more", ("red", ".hidden"), count=2)
    data = open_examples(str(folder), SMALL)
    assert data.classes == ("ants", "bees")
    assert len(data.train) + len(data.test) == 14


def test_train_and_val_folders(tmp_path):
    image_folder(tmp_path / "insects" / "train", count=5)
    image_folder(tmp_path / "insects" / "val", count=3)
    data = open_examples(str(tmp_path / "insects"), SMALL)
    assert (len(data.train), len(data.test), data.classes) == (10, 6, ("ants", "bees"))
    other = open_examples(str(tmp_path / "insects" / "train"), SMALL, str(tmp_path / "insects" / "val"))
    assert other.fingerprint == data.fingerprint
    image_folder(tmp_path / "insects" / "val", ("wasps",))
    with pytest.raises(ValueError, match="has a class 'wasps'"):
        class_names(str(tmp_path / "insects"))


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_a_share_is_held_out_of_every_class(share):
    labels = torch.arange(4).repeat_interleave(40)
    train, test = deal(labels, 0, share)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(160))
    assert torch.bincount(labels[test]).tolist() == [40 * share] * 4


def test_the_same_images_elsewhere_are_the_same_data(tmp_path):
    one = image_folder(tmp_path / "one")
    other = image_folder(tmp_path / "other")
    assert open_examples(str(one), SMALL).fingerprint == open_examples(f"{other}/.", SMALL).fingerprint
    Image.new("RGB", (9, 7), (1, 2, 3)).save(other / "ants" / "0.png")
    assert open_examples(str(one), SMALL).fingerprint != open_examples(str(other), SMALL).fingerprint


def test_resume_knows_the_data_by_content(tmp_path, monkeypatch, capsys):
    folder = image_folder(tmp_path / "insects")
    assert train_on(folder, tmp_path / "out") == 0
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "moved")
    assert train_on("./moved/", tmp_path / "out", "--resume") == 0
    Image.new("RGB", (9, 7), (1, 2, 3)).save(tmp_path / "moved" / "ants" / "0.png")
    capsys.readouterr()
    assert train_on("moved", tmp_path / "out", "--resume") == 1
    assert "is of another run: its data is that of other images" in capsys.readouterr().err.replace(
        "preprocessing", "data"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_costs_nothing(workers, tmp_path, monkeypatch, capsys):
    """Between the reading of the folder and its step."""
    folder = image_folder(tmp_path / "insects")
    data = open_examples(str(folder), SMALL)

    def vanish(*args, **choices):
        data.train.paths[-1].unlink()
        return data

    monkeypatch.setattr("tritonq.cli.train.open_examples", vanish)
    assert train_on(folder, tmp_path / "out", "--workers", workers, "--mean=0", "--std=1") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    step = read_training(tmp_path / "out" / "last.pt")[1]["step"]
    assert line.startswith(f"tritonq train: {data.train.paths[-1]} can't be read any more: ")
    assert line.endswith(f"{tmp_path / 'out' / 'last.pt'} holds step {step}, from which --resume goes on")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_held_out_file_that_vanishes_costs_nothing(workers, tmp_path, monkeypatch, capsys):
    """Between a checkpoint in an epoch and the end of the epoch."""
    folder = image_folder(tmp_path / "insects")
    words = ("--workers", workers, "--mean=0", "--std=1", "--checkpoint-every=1", "--epochs=2")
    assert train_on(folder, tmp_path / "whole", *words) == 0
    data, save = open_examples(str(folder), SMALL), Run.save
    content = data.test.paths[-1].read_bytes()

    def save_and_vanish(self, last=False):
        save(self, last)
        data.test.paths[-1].unlink(missing_ok=True)

    with monkeypatch.context() as patches:
        patches.setattr(Run, "save", save_and_vanish)
        assert train_on(folder, tmp_path / "out", *words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    path = tmp_path / "out" / "last.pt"
    assert line == (
        f"tritonq train: {data.test.paths[-1]} can't be read any more: No such file or directory; {path} holds step "
        f"{read_training(path)[1]['step']}, from which --resume goes on"
    )
    data.test.paths[-1].write_bytes(content)
    assert train_on(folder, tmp_path / "out", *words, "--resume") == 0
    found, expected = (read_training(tmp_path / name / "last.pt")[1] for name in ("out", "whole"))
    assert found["history"] == expected["history"]
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())


def test_what_cannot_be_written_is_told_once(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.csv")

    monkeypatch.setattr("tritonq.cli.training_loop.write_csv", full)
    assert train_on(image_folder(tmp_path / "insects"), tmp_path / "out", "--epochs=4") == 0
    assert capsys.readouterr().err == "tritonq train: log.csv: No space left on device; training goes on\n"


def test_channels_and_size_of_digits():
    images, labels = stacked(open_examples("digits", Preprocessing(12, 12, channels=3)).train)
    assert images.shape[1:] == (3, 12, 12)
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(labels, load_digits().train_labels)


def photo(width=70, height=50):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def options(*words, model="tritonq.demo.model:SmallResNet", arguments=()):
    parser = argparse.ArgumentParser()
    add_preprocessing_arguments(parser)
    chosen = parser.parse_args(list(words))
    chosen.model, chosen.model_arg = model, list(arguments)
    return chosen


@pytest.mark.parametrize("sides", [(70, 50), (50, 71), (33, 33), (41, 200)])
def test_torchvision_s_convention(sides):
    import_torchvision()
    from torchvision import transforms

    chosen = choose_preprocessing(options("--preprocessing=torchvision", "--image-size=28"), nn.Identity())
    assert (chosen.resize, chosen.size) == (32, 28)
    theirs = transforms.Compose(
        [
            *(transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image = photo(*sides)
    assert torch.equal(chosen.normalised(chosen.pixels(image)), theirs(image))


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0", "vit_tiny_patch16_224"])
def test_timm_s_own_config(name):
    model = timm_model(name)
    from timm.data import create_transform, resolve_data_config

    theirs = create_transform(**resolve_data_config({}, model=model), is_training=False)
    chosen = choose_preprocessing(options(), model)
    image = photo(300, 280)
    assert torch.equal(chosen.normalised(chosen.pixels(image)), theirs(image))


def test_torchvision_s_weights_say_how():
    import_torchvision()
    from torchvision.models import MobileNet_V2_Weights

    theirs = MobileNet_V2_Weights.IMAGENET1K_V2.transforms()
    spec = "torchvision.models:mobilenet_v2"
    chosen = choose_preprocessing(options("--preprocessing=model", model=spec), nn.Identity())
    image = photo(300, 280)
    # The transforms scale a tensor's pixels without rounding them; a step of 1/255 is what that may change.
    difference = (chosen.normalised(chosen.pixels(image)) - theirs(image)).abs().max()
    assert difference <= 1.01 / 255 / min(theirs.std)
    without = choose_preprocessing(options(model=spec), nn.Identity())
    assert without.mean == ()


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("resnet18", "weights=IMAGENET1K_V1"), 224),
        (("resnet18", 'weights="DEFAULT"'), 224),
        (("resnet18", "weights=None"), 32),
        (("get_model", "name=resnet18", "weights=DEFAULT"), 32),
        (("segmentation:fcn_resnet50", "weights=DEFAULT"), 32),
    ],
)
def test_weights_that_the_user_names(words, size):
    import_torchvision()
    factory, *arguments = words
    spec = f"torchvision.models{'.' if ':' in factory else ':'}{factory}"
    assert choose_preprocessing(options(model=spec, arguments=arguments), nn.Identity()).size == size


def test_preprocessing_as_plain_data():
    chosen = choose_preprocessing(options("--mean=0.5", "--std=0.25,0.5,1", "--crop=center"), nn.Identity())
    assert (chosen.mean, chosen.std, chosen.resize) == ((0.5,) * 3, (0.25, 0.5, 1.0), 36)
    assert preprocessing_from_data(preprocessing_to_data(chosen)) == chosen
    whole = preprocessing_to_data(chosen)
    for broken in ({}, {**whole, "std": [0, 0, 0]}, [1], {"size": 3}, {**whole, "size": math.inf}):
        with pytest.raises(ValueError, match=r"preprocessing|std"):
            preprocessing_from_data(broken)
    with pytest.raises(ValueError, match="in 1 or 3 channels, got 4"):
        preprocessing_from_data({**preprocessing_to_data(SMALL), "channels": 4})


def test_augmentation_is_a_function_of_seed_and_image(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("it seeded the GPUs' generators"))
    data = open_examples(str(image_folder(tmp_path / "insects")), SMALL)
    augmentation = Augmentation.named("flip,crop")
    before = torch.get_rng_state()
    one, again, later = (data.train.augmented(augmentation, seed) for seed in (5, 5, 6))
    assert torch.equal(stacked(one)[0], stacked(again)[0])
    assert not torch.equal(stacked(one)[0], stacked(later)[0])
    assert torch.equal(before, torch.get_rng_state())
    flipped = [torch.equal(data.train.augmented(Augmentation(("flip",)), s)[0][0], data.train[0][0]) for s in range(30)]
    assert 5 < sum(flipped) < 25


def test_torchvision_s_policies(tmp_path):
    import_torchvision()
    data = open_examples(str(image_folder(tmp_path / "insects")), SMALL)
    images = stacked(data.train.augmented(Augmentation.named("trivial"), 0))[0]
    assert images.shape == stacked(data.train)[0].shape
    assert not torch.equal(images, stacked(data.train)[0])


def test_workers_give_the_same_bits(tmp_path):
    folder = image_folder(tmp_path / "insects")
    for workers, output in ((0, "here"), (2, "there")):
        assert train_on(folder, tmp_path / output, "--augment=flip,crop", "--workers", workers) == 0
    one, other = (read_training(tmp_path / output / "last.pt")[1]["state_dict"] for output in ("here", "there"))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Brightness(nn.Module):
    """Images are bees if their mean is close to 0.62, which is that of bright ones as long as pixels go from 0 to 1."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 3)

    def forward(self, x):
        distance = (self.mean(x).mean((2, 3)) - 0.62).abs()
        return torch.cat([distance, 0 * distance + 0.15], 1)


@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
def test_a_better_scaling_is_named(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    torch.save(Brightness().state_dict(), tmp_path / "float.pt")
    words = [f"{__name__}:Brightness", folder, "--image-size=8", "--batch-size=4", "--epochs=1", "--no-onnx"]
    words += ["--weights", tmp_path / "float.pt"]
    assert train(*words, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "float model: accuracy 50.00%" in printed.out
    assert "with --mean 0 --std 1 the float model has 100.00% of 6 held-out images right" in printed.err
    assert train(*words, "--mean=0", "--std=1", "--output", tmp_path / "other") == 0
    printed = capsys.readouterr()
    assert "float model: accuracy 100.00%" in printed.out
    assert not printed.err
