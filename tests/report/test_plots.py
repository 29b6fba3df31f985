"""The picture of a histogram is written, holds what it should, and refuses what it cannot draw."""

import pytest
import torch

from tolerances import SUMS
from tritonq.observers import HistogramObserver, InterpolatingHistogramObserver
from tritonq.plots import densities_of, grid_points, plot_histogram
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType

pytest.importorskip("matplotlib")


def filled(kind=HistogramObserver, **arguments):
    observer = kind(dtype=arguments.pop("dtype", "qint8"), **arguments)
    generator = torch.Generator().manual_seed(0)
    observer(torch.cat((torch.randn(3000, generator=generator), torch.tensor([9.0]))))
    return observer


@pytest.mark.parametrize("dtype", ["qint8", "quint8", "qint4", "qint2", "qint1"])
@pytest.mark.parametrize("kind", [HistogramObserver, InterpolatingHistogramObserver])
def test_writes_a_png(kind, dtype, tmp_path):
    path = tmp_path / "histogram.png"
    plot_histogram(filled(kind, dtype=dtype), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("kind", [HistogramObserver, InterpolatingHistogramObserver])
def test_densities_add_up(kind):
    observer = filled(kind)
    edges, density = densities_of(observer, None)
    assert float((edges.diff() * density).sum()) == pytest.approx(1)
    assert float(edges[0]) == pytest.approx(float(observer.min_val), rel=SUMS.rtol)
    assert float(edges[-1]) == pytest.approx(9, rel=SUMS.rtol)


def test_points_of_a_float_format():
    points = grid_points(QParams(torch.tensor(0.5), torch.tensor(0)), QuantizedType.of_floats("e4m3"))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert points.tolist() == (0.5 * numbers[numbers.isfinite()].unique()).tolist()


def test_grid_points():
    points = grid_points(QParams(torch.tensor(0.5), torch.tensor(1)), QuantizedType(0, 3, symmetric=False))
    assert points.tolist() == [-0.5, 0, 0.5, 1]


def test_one_channel(tmp_path):
    observer = HistogramObserver(qscheme=torch.per_channel_affine, ch_axis=0)
    observer(torch.randn(3, 500))
    plot_histogram(observer, tmp_path / "one.png", channel=2, title="the third")
    with pytest.raises(ValueError, match="channel="):
        plot_histogram(observer, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"channel must be in 0\.\.2, got 3"):
        plot_histogram(observer, tmp_path / "none.png", channel=3)
    with pytest.raises(ValueError, match="only of such a one"):
        plot_histogram(filled(), tmp_path / "none.png", channel=0)


def test_nothing_to_draw(tmp_path):
    for kind in (HistogramObserver, InterpolatingHistogramObserver):
        with pytest.raises(ValueError, match=f"this {kind.__name__} has observed nothing"):
            plot_histogram(kind(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("value", [0.0, 2.0, -1e-20])
def test_a_single_value(value, tmp_path):
    for kind in (HistogramObserver, InterpolatingHistogramObserver):
        observer = kind(dtype="qint8")
        observer(torch.full((4,), value))
        plot_histogram(observer, tmp_path / "single.png")
