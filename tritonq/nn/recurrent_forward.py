"""The forwards of recurrent layers, on weights that a subclass provides: those of QAT and those of converted models.

Training, eval mode and deployment run them. A *packed sequence* is torch's ``PackedSequence``: the rows of all time
steps in one tensor, and the batch size of each step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tritonq.nn.own_input import QuantizesInput

_SEQUENCES = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
# What the child that quantizes a weight is called, behind the weight's name.
WEIGHT_QUANTIZER = "_fake_quant"
# What a quantizer between two layers is called, by the number of the lower one.
_BETWEEN = "layer_fake_quant_{}"


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a recurrent layer or cell that are weights, not biases.

    Of a layer these are such as ``("weight_ih_l0", "weight_hh_l0")``, of a cell ``("weight_ih", "weight_hh")``.
    """
    return tuple(name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight"))


def has_computed_weights(module: nn.Module) -> bool:
    """Whether ``module`` is recurrent and one of its weights or biases is no parameter of its own.

    That is so if ``weight_norm`` or a parametrization computes it. The biases of a cell are not looked at.
    """
    if isinstance(module, nn.RNNCellBase):
        names = ["weight_ih", "weight_hh"]
    else:
        names = [name for part in module._all_weights for name in part] if isinstance(module, nn.RNNBase) else []
    return any(name not in module._parameters for name in names)


def is_weight_quantizer(name: str) -> bool:
    """Whether a module's qualified name is that of a weight's quantizer, such as "rnn.weight_hh_l0_fake_quant".

    Its last part begins with "weight" and ends in "_fake_quant", as those of convolutions and Linears do, too.
    """
    child = name.rpartition(".")[2]
    return child.startswith("weight") and child.endswith(WEIGHT_QUANTIZER)


class RoundsWeights(QuantizesInput):
    """Base class of :class:`RecurrentForward` and :class:`RecurrentCellForward`.

    A subclass defines :meth:`quantized`, which returns each weight (rounded) and each bias by its name.

    Attributes:
        input_fake_quant: the quantizer of the input; missing if the module does not round its input.
        activation_post_process: the quantizer of the sequence that a layer returns, or of a cell's hidden state.
    """

    activation_post_process: nn.Module

    def quantized(self, name: str) -> Tensor:
        """Return the parameter ``name``, such as "weight_hh_l0", as the forward uses it.

        A bias is returned as it is, a weight rounded, as floats: before conversion by its fake quantizer, after it as
        the values that the stored codes stand for.

        Raises:
            NotImplementedError: a subclass must define it.
        """
        raise NotImplementedError


class RecurrentForward(RoundsWeights, nn.RNNBase):
    """The forward of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, one layer at a time.

    A subclass defines :meth:`quantized`, which returns each weight (rounded) and each bias by its name. The child
    ``input_fake_quant``, if there is one, rounds the input of the first layer, :attr:`quantizers_between` round what
    each layer hands to the next, and ``activation_post_process`` rounds the sequence that the last layer returns.
    Returned states are in float, as torch computes them, and so are the gates and states inside of a layer.
    """

    def parameters_of(self, layer: int) -> list[Tensor]:
        """Return weights (rounded) and biases of one layer, in the order of torch's functions.

        Layer 0 reads the input. The order is ``weight_ih, weight_hh``, then ``bias_ih, bias_hh`` if there are any, then
        ``weight_hr`` of an LSTM with projections; those of the reverse direction, if there is one, follow likewise.
        """
        names = self._all_weights[layer * self._directions : (layer + 1) * self._directions]
        return [self.quantized(name) for part in names for name in part]

    def add_quantizers_between(self, quantizers: list[nn.Module]) -> None:
        """Add quantizers of what each layer hands to the next, as children ``layer_fake_quant_0``, ``…_1`` and so on.

        Args:
            quantizers: ``num_layers - 1`` of them, the lowest first. Their number is not checked.
        """
        for index, quantizer in enumerate(quantizers):
            self.add_module(_BETWEEN.format(index), quantizer)

    @property
    def quantizers_between(self) -> list[nn.Module]:
        """The quantizers of what each layer hands to the next, the lowest first."""
        return [cast(nn.Module, self._modules[_BETWEEN.format(index)]) for index in range(self.num_layers - 1)]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return ``(sequence, states)``; arguments, shapes and packed sequences as in torch's class.

        The sequence is rounded by ``activation_post_process``; the states, ``h_n`` or ``(h_n, c_n)``, are not.

        Args:
            input: the sequence, a tensor or a ``PackedSequence``; it is rounded by the input's quantizer, if there is
                one.
            hx: the states to begin with, ``h_0`` or the tuple ``(h_0, c_0)``; None: zeros.

        Raises:
            ValueError: an input of other than 2 or 3 axes, or, outside of autocast, of another dtype than the weights;
                or another number of states than the layer has.
            RuntimeError: sizes of input or states that the layer does not take, as in torch.
        """
        packed = input if isinstance(input, PackedSequence) else None
        x: Tensor = input if packed is None else packed.data
        y: Any
        if packed is None and x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__} takes 2 or 3 axes, got the shape {tuple(x.shape)}")
        batch_axis = 0 if self.batch_first else 1
        is_batched = packed is not None or x.dim() == 3
        given = None if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        expected = ("h_0", "c_0") if self.mode == "LSTM" else ("h_0",)
        if given is not None and len(given) != len(expected):
            raise ValueError(f"hx of {type(self).__name__} is ({', '.join(expected)}), got {len(given)} of them")
        if not is_batched:
            x = x.unsqueeze(batch_axis)
            given = None if given is None else tuple(state.unsqueeze(1) for state in given)
        sizes = None if packed is None else packed.batch_sizes
        states = self._states(x, given, sizes, batch_axis)
        if packed is not None and given is not None:
            states = _reordered(states, packed.sorted_indices)
        y, states = self._run(self.quantized_input(x), states, sizes)
        if packed is not None:
            y = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            states = _reordered(states, packed.unsorted_indices)
        elif not is_batched:
            y, states = y.squeeze(batch_axis), tuple(state.squeeze(1) for state in states)
        return y, (states if self.mode == "LSTM" else states[0])

    def _states(
        self, x: Tensor, given: tuple[Tensor, ...] | None, sizes: Tensor | None, batch_axis: int
    ) -> tuple[Tensor, ...]:
        """Return the states to begin with, (layers * directions, batch, size), checked as torch checks them.

        Args:
            x: the input.
            given: the given states; None: zeros.
            sizes: batch sizes of a packed sequence; None for a plain tensor.
            batch_axis: axis of ``x`` that is the batch, for a plain tensor.
        """
        if given is None:
            batch = x.shape[batch_axis] if sizes is None else int(sizes[0])
            rows = self.num_layers * self._directions
            hidden = x.new_zeros(rows, batch, self.proj_size or self.hidden_size)
            given = (hidden, x.new_zeros(rows, batch, self.hidden_size)) if self.mode == "LSTM" else (hidden,)
        self.check_forward_args(x, cast(Any, given if self.mode == "LSTM" else given[0]), sizes)
        return given

    @property
    def _directions(self) -> int:
        """2 for a bidirectional layer, else 1."""
        return 2 if self.bidirectional else 1

    def _run(self, x: Tensor, states: tuple[Tensor, ...], sizes: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers; return the rounded sequence and the last states of all layers.

        ``sizes`` are the batch sizes of a packed sequence; None for a plain tensor.
        """
        last: list[tuple[Tensor, ...]] = []
        between = self.quantizers_between
        for layer in range(self.num_layers):
            part = slice(layer * self._directions, (layer + 1) * self._directions)
            x, *ends = self.run_layer(x, tuple(state[part] for state in states), sizes, self.parameters_of(layer))
            last.append(tuple(ends))
            if layer < len(between):
                x = F.dropout(between[layer](x), self.dropout, self.training)
        return self.activation_post_process(x), tuple(torch.cat(parts) for parts in zip(*last, strict=True))

    def run_layer(
        self, x: Tensor, states: tuple[Tensor, ...], sizes: Tensor | None, parameters: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run one layer in float; return its ``(sequence, h)``, of an LSTM ``(sequence, h, c)``, with the last states.

        Args:
            x: the layer's input, (time, batch, features), or with ``batch_first`` (batch, time, features); of a packed
                sequence its rows, (rows, features). The returned sequence has the same order of axes.
            states: the states to begin with, (directions, batch, size): two for an LSTM, else one. The last states have
                these shapes.
            sizes: ``batch_sizes`` of a packed sequence, int64 on the CPU; None for a plain tensor.
            parameters: weights and biases of the layer, as :meth:`parameters_of` returns them.
        """
        run: Any = getattr(torch._VF, _SEQUENCES[self.mode])
        begin = states if self.mode == "LSTM" else states[0]
        options = (self.bias, 1, 0.0, self.training, self.bidirectional)
        if sizes is not None:
            return cast(tuple[Tensor, ...], run(x, sizes, begin, parameters, *options))
        return cast(tuple[Tensor, ...], run(x, begin, parameters, *options, self.batch_first))


def _reordered(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    """Return states with their batch entries in another order; None: as they are."""
    return states if order is None else tuple(state.index_select(1, order) for state in states)


class RecurrentCellForward(RoundsWeights, nn.RNNCellBase):
    """The forward of ``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell``; the new hidden state is rounded.

    The child ``activation_post_process`` rounds it. The input of the step is rounded, too, if the cell has an input
    quantizer, ``input_fake_quant``. The LSTM's cell state and the gates stay in float. A subclass also derives from one
    of the three cells, and defines :meth:`quantized`, which returns a rounded weight by its name.
    """

    def cell_weights(self) -> list[Tensor]:
        """Return ``[weight_ih, weight_hh]`` as the cell multiplies by them: rounded, as floats."""
        return [self.quantized("weight_ih"), self.quantized("weight_hh")]

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next hidden state, rounded; of an LSTM (hidden state, cell state), the latter not rounded.

        Args:
            input: (batch, features) or (features,); it is rounded by the input's quantizer, if there is one.
            hx: the state to begin with, (batch, hidden_size) or (hidden_size,), for an LSTM a pair (hidden state, cell
                state) of such; None: zeros.

        Raises:
            ValueError: an input of other than 1 or 2 axes.
            RuntimeError: sizes of input or states that the cell does not take.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__} takes 1 or 2 axes, got the shape {tuple(input.shape)}")
        is_lstm, x = isinstance(self, nn.LSTMCell), torch.atleast_2d(input)
        given: tuple[Tensor, ...]
        if hx is None:
            given = (x.new_zeros(x.shape[0], self.hidden_size),) * (2 if is_lstm else 1)
        else:
            given = tuple(torch.atleast_2d(state) for state in (hx if isinstance(hx, (tuple, list)) else (hx,)))
        name = "lstm_cell" if is_lstm else "gru_cell"
        if isinstance(self, nn.RNNCell):
            name = f"rnn_{self.nonlinearity}_cell"
        run: Any = getattr(torch._VF, name)
        begin = given if is_lstm else given[0]
        made = run(self.quantized_input(x), begin, *self.cell_weights(), self.bias_ih, self.bias_hh)
        hidden, *rest = (state if input.dim() == 2 else state.squeeze(0) for state in (made if is_lstm else (made,)))
        hidden = self.activation_post_process(hidden)
        return (hidden, *rest) if is_lstm else hidden
