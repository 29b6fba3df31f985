"""Recurrent layers of a converted model: integer weights, whose values are multiplied in float.

A weight's values are ``(code - zero_point) · scale``, float32, with a scale per row or per group of a row. Biases,
gates and states are float. As in the layer that was trained, children round the input (``input_fake_quant``, if that
layer has it), what one layer hands to the next (``layer_fake_quant_0``, ...) and the returned sequence, or the hidden
state that a cell returns (``activation_post_process``); results equal those of that layer in eval mode. Constructors
take the arguments of :class:`QuantizedRecurrent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tritonq.deploy.quantizer import DeployedModule
from tritonq.deploy.values import check_shape
from tritonq.deploy.weight_codes import QUANTIZERS, codes_of_weight, weight_type
from tritonq.functional.coded_tensor import CodedTensor
from tritonq.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, QATRecurrent, RNNCell
from tritonq.nn.recurrent_forward import RecurrentCellForward, RecurrentForward, weight_names
from tritonq.quantized_type import QuantizedType
from tritonq.reference.float_rounding import floats_of_codes

_SCALE, _ZERO_POINT = "_scale", "_zero_point"


class QuantizedRecurrent(DeployedModule):
    """A recurrent layer or cell with integer weights: the base of :class:`QuantizedLSTM` and the five classes like it.

    The forward takes and returns what torch's class does. The constructor makes Identities of the quantizers between
    layers and of the output's; :func:`deployed_recurrent` replaces them.

    The state dict has the codes of ``weight_hh_l0`` under its name, ``weight_hh_l0_scale``, (rows,) or (rows, groups),
    and, unless all are 0, ``weight_hh_l0_zero_point``, int32 of the same shape; so for each weight that has codes.
    Biases are float. Codes of a float format have no zero point.

    Args:
        geometry: arguments of the float layer's constructor, by name.
        types: the quantized type of each weight, by a name such as ``weight_hh_l0`` (``weight_hh`` of a cell); None:
            the weight stays in float.
        tensors: weights (codes, or floats), biases, scales and zero points, by their names in the state dict. They
            are not copied, but for those of inference mode.

    Raises:
        ValueError: a weight or bias whose shape doesn't fit the geometry.

    Attributes:
        types: the quantized type of each weight, by name; None: the weight stayed in float.
        target: name of the engine that the model was prepared for, one of :data:`tritonq.targets.TARGETS`; None:
            unknown.
    """

    target: str | None = None
    activation_post_process: nn.Module
    float_type: ClassVar[type[nn.Module]]
    geometry_names: ClassVar[tuple[str, ...]]

    def __init__(
        self, geometry: dict[str, Any], types: Mapping[str, QuantizedType | None], tensors: Mapping[str, Tensor]
    ) -> None:
        self.float_type.__init__(self, **geometry, device="meta")
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters(recurse=False)}
        for name, shape in shapes.items():
            check_shape(name, tensors.get(name), shape)
            # Not by `del`: torch's class would look for it among its flat weights.
            self._parameters.pop(name)
        self.types = dict(types)
        integers = [name for name, qtype in types.items() if qtype is not None and qtype.float_format is None]
        self.zero_points = {name + _ZERO_POINT: (name, name + _SCALE) for name in integers}  # type: ignore[misc]
        following = {scale: zero for zero, (_, scale) in self.zero_points.items()}
        names = [each for name in tensors for each in (name, following.get(name)) if each is not None]
        self.tensor_names = tuple(dict.fromkeys(names))  # type: ignore[misc]
        self.parameter_names = self.tensor_names  # type: ignore[misc]
        self.keep(**{name: tensors.get(name) for name in self.tensor_names})
        if isinstance(self, RecurrentForward):
            self.add_quantizers_between([nn.Identity() for _ in range(self.num_layers - 1)])
        self.activation_post_process = nn.Identity()
        self.eval()

    @property
    def geometry(self) -> dict[str, Any]:
        """Constructor arguments of the float layer by name (``hidden_size`` ...), listed in ``self.geometry_names``."""
        return {name: getattr(self, name) for name in self.geometry_names}

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the input, rounded by the child ``input_fake_quant`` if there is one, as an ordinary float tensor.

        A :class:`CodedTensor` is turned into its float values, since torch's functions for recurrent layers choose
        their algorithm by the class of the tensor.
        """
        x = cast(Tensor, cast(Any, super()).quantized_input(x))
        return x.to_float() if type(x) is CodedTensor else x

    def held(self, name: str) -> Tensor | None:
        """Return the tensor that the state dict has under ``name``; None if it has none."""
        held = self._buffers.get(name)
        return self._parameters.get(name) if held is None else held

    def centred_weight(self, name: str) -> Tensor:
        """Return the codes of the weight ``name`` minus zero points, int32 if the weight has zero points.

        Without them the stored tensor of codes is returned itself. Of a float format the result is its numbers, not yet
        scaled, float32. A weight that stayed in float is returned as it is.
        """
        codes, zero, qtype = cast(Tensor, self.held(name)), self.held(name + _ZERO_POINT), self.types[name]
        if qtype is not None and qtype.float_format is not None:
            return floats_of_codes(codes, qtype.float_format)
        return codes if zero is None else codes.to(torch.int32) - self.along_rows(zero, qtype)

    def along_rows(self, values: Tensor, qtype: QuantizedType | None) -> Tensor:
        """Return ``values``, one per row or per group of a row, shaped to broadcast against a weight (rows, columns).

        ``qtype`` is the weight's type, which says how many columns a group has; None: there are no groups. Without
        groups ``values`` are (rows,), and the result is (rows, 1). With groups they are (rows, groups), and the result
        is (rows, columns), with each value repeated for all columns of its group.
        """
        group = None if qtype is None else qtype.group
        return values.unsqueeze(1) if group is None else values.repeat_interleave(group, 1)

    def quantized(self, name: str) -> Tensor:
        """Return the values of the weight or bias ``name``: float32 of codes, else the tensor as it is stored."""
        value, scale = cast(Tensor, self.held(name)), self.held(name + _SCALE)
        if scale is None:
            return value
        return self.centred_weight(name).float() * self.along_rows(scale, self.types[name])

    def extra_repr(self) -> str:
        """Return the text for ``repr``, such as ``3, 4, num_layers=2, weights=torch.int8, arithmetic=float``."""
        dtypes = {str(cast(Tensor, self.held(name)).dtype) for name in self.types}
        return f"{super().extra_repr()}, weights={', '.join(sorted(dtypes))}, arithmetic=float"


class _QuantizedSequence(QuantizedRecurrent, RecurrentForward):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise RuntimeError if the last axis of ``input`` is not ``input_size`` long.

        torch's method also compares the number of axes, which :meth:`forward` checks, and the dtype with the weights',
        which are integers here. ``batch_sizes`` is not read.
        """
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"expected input_size={self.input_size} features, got the shape {tuple(input.shape)}")


class QuantizedLSTM(_QuantizedSequence, nn.LSTM):
    """``nn.LSTM`` of a converted model: integer weights with a scale per row or group, float gates, biases and states.

    It has the quantizers of the trained layer and its results in eval mode; :class:`QuantizedRecurrent` describes both.
    """

    float_type = nn.LSTM
    geometry_names = LSTM.geometry_names


class QuantizedGRU(_QuantizedSequence, nn.GRU):
    """``nn.GRU`` of a converted model: integer weights with a scale per row or group, float gates and states."""

    float_type = nn.GRU
    geometry_names = GRU.geometry_names


class QuantizedRNN(_QuantizedSequence, nn.RNN):
    """``nn.RNN`` of a converted model: integer weights with a scale per row or group, float biases and states."""

    float_type = nn.RNN
    geometry_names = RNN.geometry_names


class _QuantizedCell(QuantizedRecurrent, RecurrentCellForward):
    """The base of the converted cells."""


class QuantizedLSTMCell(_QuantizedCell, nn.LSTMCell):
    """``nn.LSTMCell`` of a converted model: integer weights with a scale per row or group, float gates and states."""

    float_type = nn.LSTMCell
    geometry_names = LSTMCell.geometry_names


class QuantizedGRUCell(_QuantizedCell, nn.GRUCell):
    """``nn.GRUCell`` of a converted model: integer weights with a scale per row or group, float gates and states."""

    float_type = nn.GRUCell
    geometry_names = GRUCell.geometry_names


class QuantizedRNNCell(_QuantizedCell, nn.RNNCell):
    """``nn.RNNCell`` of a converted model: integer weights with a scale per row or group, float biases and states."""

    float_type = nn.RNNCell
    geometry_names = RNNCell.geometry_names


# By the float layer that a quantization-aware one is derived from.
RECURRENT_TYPES: dict[type[nn.Module], type[QuantizedRecurrent]] = {
    cls.float_type: cls
    for cls in (QuantizedLSTM, QuantizedGRU, QuantizedRNN, QuantizedLSTMCell, QuantizedGRUCell, QuantizedRNNCell)
}


def deployed_recurrent(layer: QATRecurrent, quantizers: Mapping[nn.Module, nn.Module]) -> QuantizedRecurrent:
    """Return the deployed form of a recurrent layer, in eval mode: weights as codes, biases copied, quantizers fixed.

    A weight stays in float if its quantizer is an Identity, switched off or without a range. The result has no
    ``input_fake_quant``: :func:`tritonq.convert` adds it.

    Args:
        layer: the trained layer; it is not changed.
        quantizers: deployed quantizers of activations, by the trained ones. A quantizer between layers or of the output
            that is no key of it is put into the result itself, not a copy.

    Raises:
        ValueError: a weight quantizer of a class without a grid, with scales along another axis than the rows', or with
            blocks of floats that don't divide the columns.
    """
    made = RECURRENT_TYPES[layer.float_type]
    types: dict[str, QuantizedType | None] = {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters(recurse=False):
        tensors[name] = parameter.detach().clone()
        quantizer = layer.weight_quantizer(name) if name in weight_names(layer) else None
        if quantizer is None or isinstance(quantizer, nn.Identity):
            types |= {} if quantizer is None else {name: None}
            continue
        if not isinstance(quantizer, QUANTIZERS):
            raise ValueError(f"a weight quantizer of type {type(quantizer).__name__} has no grid")
        types[name] = weight_type(quantizer)
        if types[name] is not None:
            is_nearest = getattr(quantizer, "rounds_to_nearest", True)
            codes, scale, zero = codes_of_weight(parameter if is_nearest else quantizer(parameter), quantizer)
            tensors |= {name: codes, f"{name}_scale": scale}
            tensors |= {f"{name}_zero_point": zero} if bool(zero.any()) else {}
    deployed = made({name: getattr(layer, name) for name in layer.geometry_names}, types, tensors)
    for name, child in layer.named_children():
        if name in deployed._modules:
            deployed.add_module(name, quantizers.get(child, child))
    deployed.target = layer.qconfig.target
    return deployed
