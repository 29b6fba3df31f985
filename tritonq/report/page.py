"""The report as one HTML page that asks nothing of the network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from importlib import resources

from tritonq.report.drawing import histogram, noise_by_position, share_bar
from tritonq.report.measure import LayerMeasure, ModelMeasure
from tritonq.report.summary import LayerSummary
from tritonq.report.tally import TensorMeasure

# Above this fraction of clipped values a cell is marked: one in a thousand is what percentile searches leave outside.
_CLIP_WARNING = 0.001
# Above this one the range is the matter, whatever else is.
_CLIP_ALARM = 0.01
_WORST_SHOWN = 8
# A layer that alone makes this much of the error of the whole model is named in the advice.
_DOMINANT = 0.5

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


def render(measured: ModelMeasure, data_name: str, origin: str) -> str:
    """The page.

    Args:
        measured: what :func:`~tritonq.report.measure.measure` found.
        data_name: where the images come from.
        origin: what the model is and where its ranges come from, for the line below the title.
    """
    title = f"Quantization of {measured.model}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#layers">Skip to the table of layers</a>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(origin)}; {measured.images:,} images of {escape(data_name)}</p>
</header>
<main>
{_cards(measured)}
<div class="panels">{_worst_panel(measured)}{_noise_panel(measured)}</div>
{_advice(measured)}
{_table(measured)}
{_float_layers(measured.summary.in_float)}
{_terms()}
</main>
<footer>Made by tritonq. This page holds everything that it shows.</footer>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (resources.files("tritonq.report") / name).read_text(encoding="utf-8")


def _cards(measured: ModelMeasure) -> str:
    quantized, left = len(measured.summary.quantized), len(measured.summary.in_float)
    tensors = [(layer, tensor) for layer in measured.layers for tensor in layer.tensors]
    layer, tensor = min(tensors, key=lambda item: item[1].sqnr)
    cards = (
        (
            "Accuracy with rounding",
            _percent(measured.quantized_accuracy),
            f"{_percent(measured.float_accuracy)} without; {_percent(measured.agreement)} of all predictions agree",
        ),
        ("Error of the output", _percent(measured.error), "with every layer rounded, relative to the float output"),
        (
            "Layers quantized",
            f"{quantized}",
            f"{len(measured.summary.absorbed)} more fused into them, {left} left in float (listed below)",
        ),
        ("Noisiest tensor", _decibels(tensor.sqnr), f"{tensor.role} of {layer.name}"),
    )
    items = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd><span class="value">{value}</span>'
        f'<span class="detail">{escape(detail)}</span></dd></div>'
        for name, value, detail in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _worst_panel(measured: ModelMeasure) -> str:
    worst = measured.layers[:_WORST_SHOWN]
    largest = worst[0].sensitivity if worst else 0.0
    items = "".join(
        f'<li><a href="#{_anchor(layer)}">{escape(layer.name)}</a>{share_bar(layer.sensitivity / (largest or 1.0))}'
        f'<span class="num">{_percent(layer.sensitivity)}</span></li>'
        for layer in worst
    )
    return (
        '<section class="panel" aria-labelledby="worst"><h2 id="worst">Which layers cost the most</h2>'
        '<p class="note">error of the output with one layer alone rounded</p>'
        f'<ol class="worst">{items}</ol></section>'
    )


def _noise_panel(measured: ModelMeasure) -> str:
    weight = '<svg viewBox="0 0 12 12" aria-hidden="true"><rect class="weight" x="2" y="2" width="8" height="8"/></svg>'
    output = '<svg viewBox="0 0 12 12" aria-hidden="true"><circle class="output" cx="6" cy="6" r="4"/></svg>'
    return (
        '<section class="panel" aria-labelledby="noise"><h2 id="noise">Signal to quantization noise, in dB</h2>'
        f'<p class="note"><span class="key">{output} activations</span><span class="key">{weight} weights</span>'
        f'<span class="key">higher is better</span></p>{noise_by_position(measured.layers)}</section>'
    )


def _advice(measured: ModelMeasure) -> str:
    """What the worst layer suggests, in a sentence or two."""
    if not measured.layers or not measured.error:
        return ""
    worst = measured.layers[0]
    name = f"<code>{escape(worst.name)}</code>"
    clipping = max(worst.tensors, key=lambda tensor: tensor.clipped, default=None)
    if worst.sensitivity < _DOMINANT * measured.error:
        reason = ": leaving a single one in float would change little" if worst.has_float_form else ""
        return f'<p class="advice">No layer stands out{reason}.</p>'
    text = (
        f"{name} alone makes an error of {_percent(worst.sensitivity)}; all layers together make "
        f"{_percent(measured.error)}. "
    )
    if not worst.has_float_form:
        text += "Its formats are found in training: more of it, with a search for lengths, may serve it better."
    elif clipping is not None and clipping.clipped > _CLIP_ALARM:
        text += (
            f"Its {clipping.role} loses {_percent(clipping.clipped)} of its values to clipping: the range is too small "
            "for what the trained model does. Let its observer see more batches, or calibrate."
        )
    elif worst.worst("weight") is None:
        text += "An observer that searches its range, or a trained scale, may serve it better."
    else:
        rule = escape(f'QConfigMapping().set_global(qconfig).set_module_name("{worst.name}", None)')
        text += f"To leave it in float: <code>{rule}</code>"
    return f'<p class="advice">{text}</p>'


def _table(measured: ModelMeasure) -> str:
    heads = "".join(
        f'<th scope="col" class="{side}" aria-sort="{order}"><button type="button">{escape(name)}</button></th>'
        for name, side, order in _COLUMNS
    )
    largest = max((layer.sensitivity for layer in measured.layers), default=0.0) or 1.0
    rows = "".join(_row(layer, largest) for layer in measured.layers)
    return (
        '<div class="scroll" id="layers" tabindex="0" role="region" aria-label="Layers, worst first">'
        "<table><caption><h2>Layers, worst first</h2>"
        '<span class="note">Click a heading to sort by it; every term is explained at the end.</span></caption>'
        f'<thead><tr>{heads}<th scope="col">output and its codes</th><th scope="col">weight and its codes</th>'
        "</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(layer: LayerMeasure, largest: float) -> str:
    output, weight = layer.worst("output") or layer.worst("input"), layer.worst("weight")
    clip = "right num warn" if layer.clipped > _CLIP_WARNING else "right num"
    return (
        f'<tr id="{_anchor(layer)}"><th scope="row" data-sort="{layer.position}"><span class="layer">'
        f'{escape(layer.name)}</span><span class="kind">{escape(layer.kind)}, no. {layer.position}</span></th>'
        f'<td class="right num" data-sort="{layer.sensitivity:.9g}">{_percent(layer.sensitivity)}'
        f"{share_bar(layer.sensitivity / largest)}</td>"
        f"{_noise_cell(output)}{_noise_cell(weight)}"
        f'<td class="{clip}" data-sort="{layer.clipped:.9g}">{_percent(layer.clipped)}</td>'
        f"{_scale_cell(output, weight)}"
        f"{_histograms(layer, False)}{_histograms(layer, True)}</tr>"
    )


def _histograms(layer: LayerMeasure, of_weight: bool) -> str:
    drawn = [histogram(tensor) for tensor in layer.tensors if (tensor.role == "weight") == of_weight]
    return f"<td>{''.join(drawn)}</td>"


def _noise_cell(tensor: TensorMeasure | None) -> str:
    if tensor is None:
        return '<td class="right num" data-sort="999">-</td>'
    value = tensor.sqnr if math.isfinite(tensor.sqnr) else math.copysign(998, tensor.sqnr)
    return f'<td class="right num" data-sort="{value:.4f}">{_decibels(tensor.sqnr)}</td>'


def _scale_cell(output: TensorMeasure | None, weight: TensorMeasure | None) -> str:
    shown = [f'<span title="{escape(output.grid)}">{_span(output.scale)}</span>'] if output is not None else []
    if weight is not None:
        shown.append(f'<span class="kind" title="{escape(weight.grid)}">[{_span(weight.scale)}]</span>')
    first = output or weight
    return f'<td class="right num" data-sort="{first.scale[1] if first else 0:.9g}">{"".join(shown)}</td>'


def _float_layers(layers: Iterable[LayerSummary]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><span class="layer">{escape(layer.name)}</span></th><td>{escape(layer.kind)}</td>'
        f"<td>{escape(layer.reason)}</td></tr>"
        for layer in layers
    )
    if not rows:
        return ""
    return (
        "<details><summary>Layers left in float, and why</summary><table><thead><tr>"
        '<th scope="col">layer</th><th scope="col">kind</th><th scope="col">reason</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )


def _terms() -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in _TERMS)
    return f"<details open><summary>What the terms mean</summary><dl>{items}</dl></details>"


def _anchor(layer: LayerMeasure) -> str:
    return f"layer-{layer.position}"


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.3f} %" if 0 < percent < 0.1 else f"{percent:.2f} %"


def _decibels(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "no signal"
    return f"{value:.1f} dB"


def _span(scale: tuple[float, float]) -> str:
    low, high = (f"{value:.3g}" for value in scale)
    return low if low == high else f"{low} … {high}"
