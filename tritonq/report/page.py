"""The report as one HTML page that needs no network: ``page.html``, filled in by Jinja2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tritonq.report.advice import advise, percent
from tritonq.report.drawing import histogram, noise_by_position, share_bar
from tritonq.report.measure import LayerMeasure, ModelMeasure
from tritonq.report.tally import TensorMeasure

# Above this fraction of clipped values a cell is marked: one in a thousand is what percentile searches leave outside.
_CLIP_WARNING = 0.001
_WORST_SHOWN = 8
# Where a table is sorted by decibels: no such tensor comes after exact ones.
_NO_TENSOR, _EXACT = 999.0, 998.0

_COLUMNS = (
    ("layer", "", "none"),
    ("error alone", "right", "descending"),
    ("output SQNR", "right", "none"),
    ("weight SQNR", "right", "none"),
    ("clipped", "right", "none"),
    ("scale", "right", "none"),
)
_TERMS = (
    (
        "error alone",
        "Norm of the change of the model's output over the norm of the output, with this layer alone rounded.",
    ),
    (
        "SQNR",
        "Signal-to-quantization-noise ratio, 10 log₁₀ of the power of a tensor over that of its rounding and clipping "
        "error. 6 dB are worth one bit. Signals are the float model's; weights have their BatchNorm folded in.",
    ),
    ("clipped", "Fraction of the values that lie more than half a step outside the codes of the grid."),
    (
        "scale",
        "The step of the grid; a span where each channel has its own. For weights it is the weight's, in brackets. In "
        "fixed point it is 2 to the power of minus the fraction length, in units of the layer's scaling factor.",
    ),
    (
        "histograms",
        "Values by the code that they ask for; heights are logarithms. The shaded field holds the codes that exist; "
        "what stands outside of it, in the other colour, is clipped. An input of its own stands above the output.",
    ),
)


@dataclass(frozen=True)
class _Cell:
    """A number in the table of layers.

    Attributes:
        text: what is shown.
        key: the number by which the column is sorted.
        warn: whether it is marked as bad.
        below: markup or a remark below it.
    """

    text: str
    key: float
    warn: bool = False
    below: str = ""


def render(measured: ModelMeasure, data_name: str, origin: str) -> str:
    """Return the page as HTML: ``page.html`` with the numbers, drawings and advice for ``measured``.

    Args:
        measured: what :func:`~tritonq.report.measure.measure` found.
        data_name: where the images come from, such as ``"scikit-learn's digits"``.
        origin: what the model is and where its ranges come from, for the line below the title, such as
            ``"torchvision.models:resnet18, as its factory gives it, calibrated"``.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    largest = max((layer.sensitivity for layer in measured.layers), default=0.0) or 1.0
    return environment.from_string(_asset("page.html")).render(
        title=f"Quantization of {measured.model}",
        measured=measured,
        data_name=data_name,
        origin=origin,
        cards=_cards(measured),
        worst=measured.layers[:_WORST_SHOWN],
        noise=Markup(noise_by_position(measured.layers)),
        advice=advise(measured),
        columns=_COLUMNS,
        rows=[(layer, _cells(layer, largest)) for layer in measured.layers],
        terms=_TERMS,
        percent=percent,
        share=lambda layer: Markup(share_bar(layer.sensitivity / largest)),
        histograms=_histograms,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
    )


def _asset(name: str) -> str:
    return (resources.files("tritonq.report") / name).read_text(encoding="utf-8")


def _cards(measured: ModelMeasure) -> list[tuple[str, str, str]]:
    """Return name, value and detail, as texts, of each of the four numbers at the top of the page.

    They are accuracy with rounding, error of the output, layers quantized, and SQNR of the noisiest tensor.
    """
    quantized, left = len(measured.summary.quantized), len(measured.summary.in_float)
    tensors = [(layer, tensor) for layer in measured.layers for tensor in layer.tensors]
    layer, tensor = min(tensors, key=lambda item: item[1].sqnr)
    return [
        (
            "Accuracy with rounding",
            percent(measured.quantized_accuracy),
            f"{percent(measured.float_accuracy)} without; {percent(measured.agreement)} of all predictions agree",
        ),
        ("Error of the output", percent(measured.error), "with every layer rounded, relative to the float output"),
        (
            "Layers quantized",
            f"{quantized}",
            f"{len(measured.summary.absorbed)} more fused into them, {left} left in float"
            + (" (listed below)" if left else ""),
        ),
        ("Noisiest tensor", _decibels(tensor.sqnr), f"{tensor.role} of {layer.name}"),
    ]


def _cells(layer: LayerMeasure, largest: float) -> list[_Cell]:
    output, weight = layer.worst("output") or layer.worst("input"), layer.worst("weight")
    bar = Markup(share_bar(layer.sensitivity / largest))
    return [
        _Cell(percent(layer.sensitivity), layer.sensitivity, below=bar),
        _noise_cell(output),
        _noise_cell(weight),
        _Cell(percent(layer.clipped), layer.clipped, warn=layer.clipped > _CLIP_WARNING),
        _scale_cell(output, weight),
    ]


def _histograms(layer: LayerMeasure, of_weight: bool) -> Markup:
    drawn = [histogram(tensor) for tensor in layer.tensors if (tensor.role == "weight") == of_weight]
    return Markup("".join(drawn))


def _noise_cell(tensor: TensorMeasure | None) -> _Cell:
    if tensor is None:
        return _Cell("-", _NO_TENSOR)
    return _Cell(
        _decibels(tensor.sqnr), tensor.sqnr if math.isfinite(tensor.sqnr) else math.copysign(_EXACT, tensor.sqnr)
    )


def _scale_cell(output: TensorMeasure | None, weight: TensorMeasure | None) -> _Cell:
    first = output or weight
    below: str = ""
    if weight is not None:
        below = Markup('<span class="kind" title="{}">[{}]</span>').format(weight.grid, _span(weight.scale))
    return _Cell("" if output is None else _span(output.scale), first.scale[1] if first else 0.0, below=below)


def _decibels(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "no signal"
    return f"{value:.1f} dB"


def _span(scale: tuple[float, float]) -> str:
    low, high = (f"{value:.3g}" for value in scale)
    return low if low == high else f"{low} … {high}"
