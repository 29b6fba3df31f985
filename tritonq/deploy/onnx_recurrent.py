"""LSTM, GRU and RNN in ONNX files: the operators of these names, on weights behind DequantizeLinear.

ONNX Runtime has no integer kernel for them (DynamicQuantizeLSTM finds its input's scales while it runs), so that they
compute in float between quantized tensors, as the trained model does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tritonq.deploy.onnx_ops import dequantize
from tritonq.deploy.onnx_packed import PACKED_OPSET
from tritonq.deploy.recurrent import QuantizedRecurrent
from tritonq.nn.recurrent_forward import RecurrentForward
from tritonq.prepare.forwards.edited import set_inner_forward
from tritonq.quantized_type import QuantizedType

# Torch's gates in ONNX's order: input, output, forget, cell of (i, f, g, o); update, reset, hidden of (r, z, n).
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


@torch.library.custom_op("tritonq::recurrent", mutates_args=())
def recurrent(x: Tensor, states: list[Tensor], weights: list[Tensor], mode: str, hidden_size: int) -> list[Tensor]:
    """Return ``[sequence, *last states]`` of one recurrent layer whose gates are in ONNX's order; all float32.

    The sequence is (time, batch, directions · hidden_size), the last states are shaped as ``states``. The gates' order,
    in weights and biases, is input, output, forget, cell for an LSTM; update, reset, hidden for a GRU.

    Args:
        x: (time, batch, features).
        states: the first h, and for an LSTM c, each (directions, batch, hidden_size).
        weights: for each direction weight_ih, weight_hh and, of a layer with biases, bias_ih and bias_hh one behind the
            other in one vector.
        mode: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        hidden_size: width of a state.
    """
    order, parts = _GATES[mode], len(weights) // states[0].shape[0]
    back = torch.tensor(order).argsort()
    flat = []
    for direction in range(states[0].shape[0]):
        w_ih, w_hh, *bias = weights[direction * parts : (direction + 1) * parts]
        flat += [_gates(part, back) for part in (w_ih, w_hh, *(bias[0].chunk(2) if bias else ()))]
    run: Any = getattr(torch._VF, mode.lower())
    begin = tuple(states) if mode == "LSTM" else states[0]
    return list(run(x, begin, flat, parts == 3, 1, 0.0, False, len(states[0]) == 2, False))


@recurrent.register_fake
def _(x: Tensor, states: list[Tensor], weights: list[Tensor], mode: str, hidden_size: int) -> list[Tensor]:
    width = hidden_size * states[0].shape[0]
    return [x.new_empty(x.shape[0], x.shape[1], width), *(torch.empty_like(state) for state in states)]


def _gates(x: Tensor, order: Tensor) -> Tensor:
    """Return the rows of ``x``, (gates · size, ...), one block per gate, with the blocks in another order.

    Block i of the result is block ``order[i]`` of ``x``.
    """
    return torch.unflatten(x, 0, (len(order), -1))[order].flatten(0, 1)


def rewrite_recurrent(layer: QuantizedRecurrent, name: str, in_float: bool) -> None:
    """Make a layer trace to ONNX's operator, on weights behind DequantizeLinear, or with ``in_float`` on float weights.

    Weights without integer codes of 8 bits or fewer are float weights in any case. The rewritten forward raises
    ValueError for packed sequences.

    Args:
        layer: changed in place.
        name: the layer's name in the model, for messages.
        in_float: whether the file holds the weights' float values, not their codes.

    Raises:
        ValueError: a cell, or an LSTM with projections, for which ONNX has no operator.
    """
    if not isinstance(layer, RecurrentForward) or layer.proj_size:
        what = "an LSTM with projections" if isinstance(layer, nn.LSTM) else f"a single {layer.float_type.__name__}"
        raise ValueError(f"{name!r}: ONNX has no operator for {what}; an nn.LSTM or nn.GRU over whole sequences has")
    order = torch.tensor(_GATES[layer.mode])
    for key, qtype in layer.types.items():
        scale, zero = layer.held(f"{key}_scale"), layer.held(f"{key}_zero_point")
        codes = cast(Tensor, layer.held(key))
        has_integers = codes.dtype in (torch.int8, torch.uint8) and qtype is not None and qtype.float_format is None
        if in_float or scale is None or not has_integers:
            layer.keep(**{key: _gates(layer.quantized(key), order), f"{key}_scale": None})
            continue
        zero = torch.zeros_like(scale, dtype=codes.dtype) if zero is None else zero.to(codes.dtype)
        held = {key: codes, f"{key}_scale": scale, f"{key}_zero_point": zero}
        layer.keep(**{held_name: _gates(tensor, order) for held_name, tensor in held.items()})
        if cast(QuantizedType, qtype).group is not None:
            layer.least_opset = PACKED_OPSET
    for part in layer._all_weights:
        biases = [cast(Tensor, layer.held(key)) for key in part if key.startswith("bias")]
        if biases:
            layer.keep(**{f"{part[0]}_biases": torch.cat([_gates(bias, order) for bias in biases])})
    set_inner_forward(layer, partial(_forward, layer))
    layer.parameters_of = partial(_parameters_of, layer)  # type: ignore[method-assign]
    layer.run_layer = partial(_run_layer, layer)  # type: ignore[method-assign]


def _forward(layer: RecurrentForward, input: Any, hx: Any = None) -> Any:
    if isinstance(input, PackedSequence):
        raise ValueError("packed sequences have no form in ONNX: export the model on padded ones")
    return type(layer).forward(layer, input, hx)


def _parameters_of(layer: RecurrentForward, number: int) -> list[Tensor]:
    directions = 2 if layer.bidirectional else 1
    found: list[Tensor] = []
    for part in layer._all_weights[number * directions : (number + 1) * directions]:
        found += [_weight(cast(QuantizedRecurrent, layer), key) for key in part if key.startswith("weight")]
        found += [layer._buffers[f"{part[0]}_biases"]] if layer.bias else []  # type: ignore[list-item]
    return found


def _weight(layer: QuantizedRecurrent, key: str) -> Tensor:
    codes, scale = cast(Tensor, layer.held(key)), layer.held(f"{key}_scale")
    if codes.is_floating_point():
        return codes
    group = cast(QuantizedType, layer.types[key]).group
    zero = layer._buffers[f"{key}_zero_point"]
    return cast(Tensor, dequantize(codes, scale, zero, 0 if group is None else 1, group))


def _run_layer(
    layer: RecurrentForward, x: Tensor, states: tuple[Tensor, ...], sizes: Tensor | None, parameters: list[Tensor]
) -> tuple[Tensor, ...]:
    by_time = x.transpose(0, 1) if layer.batch_first else x
    y, *ends = recurrent(by_time, list(states), parameters, layer.mode, layer.hidden_size)
    return (y.transpose(0, 1) if layer.batch_first else y, *ends)


def recurrent_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of :func:`recurrent` to ONNX operators, a ``custom_translation_table`` of torch.onnx.

    Raises:
        ImportError: onnxscript is not installed.
    """
    from onnxscript import opset18 as op

    def translate(x: Any, states: Any, weights: Any, mode: str, hidden_size: int) -> Any:
        directions = states[0].shape[0]
        parts = len(weights) // directions
        tables = [
            op.Concat(*(op.Unsqueeze(table, op.Constant(value_ints=[0])) for table in weights[start::parts]), axis=0)
            for start in range(parts)
        ]
        bias = tables[2] if parts == 3 else None
        options = {"hidden_size": hidden_size, "direction": "bidirectional" if directions == 2 else "forward"}
        if mode == "LSTM":
            y, *ends = op.LSTM(x, tables[0], tables[1], bias, None, states[0], states[1], **options)
        elif mode == "GRU":
            y, *ends = op.GRU(x, tables[0], tables[1], bias, None, states[0], linear_before_reset=1, **options)
        else:
            functions = ["Tanh" if mode == "RNN_TANH" else "Relu"] * directions
            y, *ends = op.RNN(x, tables[0], tables[1], bias, None, states[0], activations=functions, **options)
        # (time, directions, batch, hidden) to torch's (time, batch, directions * hidden).
        by_batch = op.Transpose(y, perm=[0, 2, 1, 3])
        return [op.Reshape(by_batch, op.Constant(value_ints=[0, 0, -1])), *ends]

    table: Any = torch.ops.tritonq
    return {table.recurrent.default: translate}
