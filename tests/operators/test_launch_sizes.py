"""Launch sizes: the function, and tables that override it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tritonq.kernels import launch_sizes
from tritonq.kernels.conv_tile import ConvTile
from tritonq.kernels.layout import view


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GOOD = {"elements": 2048, "max_cols": 256, "warps": 8}


GOOD_TILE = {"pixels": 64, "outs": 128, "channels": 32, "warps": 8, "stages": 3}


def table(**entries: object) -> dict[str, object]:
    return {"version": 1, "gpu": "NVIDIA H200", "kernels": {"fake_quantize": entries}}


def test_table_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "gpu.json", table(**{"float32/flat/large": GOOD}))
    assert launch_sizes.load_table(path) == {
        "fake_quantize": {"float32/flat/large": launch_sizes.Parameters(2048, 256, 8)}
    }


def conv_table(**entries: object) -> dict[str, object]:
    return {"version": 1, "gpu": "NVIDIA H200", "kernels": {"conv2d": entries}}


def test_convolutions_have_tiles_or_leave_it_to_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "gpu.json", conv_table(a=GOOD_TILE, b="torch"))
    assert launch_sizes.load_table(path) == {"conv2d": {"a": ConvTile(64, 128, 32, 8, 3), "b": "torch"}}


def test_no_table_is_silent(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert launch_sizes.load_table(tmp_path / "missing.json") == {}
    assert not recwarn.list


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        {},
        {"version": 2, "kernels": {}},
        {"version": 1},
        {"version": 1, "kernels": []},
        table(key=[]),
        table(key={"elements": 2048}),
        table(key={**GOOD, "stages": 3}),
        table(key={**GOOD, "warps": 3}),
        table(key={**GOOD, "warps": 0}),
        table(key={**GOOD, "elements": "many"}),
        table(key={**GOOD, "elements": 1.5}),
        table(key="torch"),
        table(key=GOOD_TILE),
        conv_table(key="cudnn"),
        conv_table(key=GOOD),
        conv_table(key={**GOOD_TILE, "pixels": 48}),
        conv_table(key={**GOOD_TILE, "stages": 0}),
        conv_table(key={**GOOD_TILE, "stages": 9}),
        conv_table(key={**GOOD_TILE, "stages": "3"}),
        conv_table(key={name: size for name, size in GOOD_TILE.items() if name != "stages"}),
    ],
)
def test_damaged_table_is_named_and_ignored(content: object, tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.json", content)
    with pytest.warns(UserWarning, match=r"damaged\.json"):
        assert launch_sizes.load_table(path) == {}


def test_table_overrides_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "nvidia_h200.json", table(**{"float32/flat/small": GOOD}))
    monkeypatch.setattr(launch_sizes, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    launch_sizes._parameters.cache_clear()
    seen = view((64,), ((1,), (1,)), None)
    assert seen is not None
    device = torch.device("cuda", 0)
    default = launch_sizes.default_parameters("flat", "small")
    with launch_sizes.override("fake_quantize", "torch"):  # no launch size
        assert launch_sizes.parameters("fake_quantize", torch.float32, seen, device) == default
    assert launch_sizes.parameters("fake_quantize", torch.float32, seen, device) == launch_sizes.Parameters(**GOOD)
    assert launch_sizes.parameters("fake_quantize", torch.float16, seen, device) == default
    assert launch_sizes.parameters("other", torch.float32, seen, device) == default
    assert launch_sizes.parameters("fake_quantize", torch.float32, seen, torch.device("cpu")) == default
    launch_sizes._parameters.cache_clear()


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("NVIDIA H200", "nvidia_h200"),
        ("AMD Instinct MI300X", "amd_instinct_mi300x"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"),
    ],
)
def test_file_names(name: str, stem: str) -> None:
    assert launch_sizes.gpu_file_stem(name) == stem


def tile_of(kernel: str = "fake_quantize") -> tuple[int, ...]:
    seen = view((64, 64), ((64, 1),), None)
    assert seen is not None
    return tuple(launch_sizes.plan(kernel, torch.float32, seen, torch.device("cpu")).tile)


def test_an_override_counts_in_its_block_alone() -> None:
    default, other = tile_of(), tile_of("min_max")
    with launch_sizes.override("fake_quantize", launch_sizes.Parameters(512, 64, 2)):
        assert tile_of() == (1, 64, 2)
        assert tile_of("min_max") == other
        with launch_sizes.override("fake_quantize", launch_sizes.Parameters(256, 64, 1)):
            assert tile_of() == (1, 64, 1)
        assert tile_of() == (1, 64, 2)
        seen: list[tuple[int, ...]] = []
        thread = threading.Thread(target=lambda: seen.append(tile_of()))
        thread.start()
        thread.join()
        assert seen == [default]
    with pytest.raises(ZeroDivisionError), launch_sizes.override("fake_quantize", launch_sizes.Parameters(512, 64, 2)):
        _ = 1 / 0
    assert tile_of() == default


def test_an_override_of_every_kernel_leaves_convolutions_alone() -> None:
    small = launch_sizes.Parameters(512, 64, 2)
    with (
        launch_sizes.override(launch_sizes.EVERY_KERNEL, small),
        launch_sizes.override("min_max", launch_sizes.Parameters(256, 64, 1)),
    ):
        assert tile_of() == (1, 64, 2)
        assert launch_sizes.overridden("min_max") == launch_sizes.Parameters(256, 64, 1)
        with launch_sizes.override("conv2d", "torch"), launch_sizes.override(launch_sizes.EVERY_KERNEL, small):
            assert launch_sizes.overridden("min_max") == launch_sizes.overridden("fake_quantize") == small
            assert launch_sizes.overridden("conv2d") == "torch"
        assert launch_sizes.overridden("min_max") == launch_sizes.Parameters(256, 64, 1)
        assert launch_sizes.overridden("conv2d") is None
    with launch_sizes.override("conv2d", "torch"):
        assert launch_sizes.overridden("conv2d") == "torch"


def test_shipped_tables_are_sound(recwarn: pytest.WarningsRecorder) -> None:
    for path in launch_sizes.TABLES.glob("*.json"):
        launch_sizes.load_table(path)
    assert not recwarn.list
