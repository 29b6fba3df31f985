"""Quantization-aware LSTM, GRU and RNN: every weight matrix is fake-quantized, and so is the sequence of each layer.

The weight's quantizer is the child with ``_fake_quant`` behind its name, such as ``weight_hh_l0_fake_quant``. What
layer i hands to the next is rounded by ``layer_fake_quant_i``, and the returned sequence, or the hidden state that a
cell returns, by ``activation_post_process``. The input is rounded only if there is a child ``input_fake_quant``, which
``prepare_qat`` adds where needed. Biases, gates and other states stay in float; the arithmetic is torch's, in float.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.granularity import granularity_of
from tritonq.nn.conv import check_float_type
from tritonq.nn.qat import checked_qconfig, without_qconfig
from tritonq.nn.recurrent_forward import WEIGHT_QUANTIZER, RecurrentCellForward, RecurrentForward, weight_names
from tritonq.qconfig import QConfig


class QATRecurrent(nn.Module):
    """The base of quantization-aware recurrent layers and cells: a quantizer for each weight matrix.

    The quantizer of ``weight_hh_l0`` is the child ``weight_hh_l0_fake_quant``. It has one scale per row of the matrix
    if the qconfig's weights have one per channel, one per group along each row if they have groups, else one in all.
    Parameters keep their names, so that float checkpoints load. ``activation_post_process`` rounds the sequence that a
    layer returns, or the hidden state that a cell returns. Biases, gates and other states stay in float.

    Attributes:
        qconfig: the qconfig that made the quantizers.
        float_type: the float class that the class replaces, such as ``nn.LSTM``.
        geometry_names: names of the constructor's arguments that :meth:`from_float` reads as attributes of the float
            module, such as "hidden_size".

    Examples:
        >>> import torch, tritonq
        >>> gru = tritonq.nn.GRU(4, 8, qconfig=tritonq.get_qconfig())
        >>> isinstance(gru, tritonq.nn.QATRecurrent), gru.weight_hh_l0_fake_quant.scale.shape
        (True, torch.Size([24]))
    """

    qconfig: QConfig
    float_type: ClassVar[type[nn.Module]]
    geometry_names: ClassVar[tuple[str, ...]]

    def attach_quantizers(self, qconfig: QConfig | None, layers: int) -> None:
        """Create the quantizers of ``qconfig`` as children, with buffers in their final shapes.

        - one per weight, under its name and ``_fake_quant`` (``weight_ih_l0_fake_quant``);
        - one between each two layers, ``layers - 1`` in all; a cell, which is one step of one layer, has none;
        - one for the output, ``activation_post_process``.

        The constructor calls it once, after torch's. ``prepare_qat`` adds the input's quantizer, not this method.

        Args:
            qconfig: makes the quantizers.
            layers: how many layers the module runs one after the other.

        Raises:
            TypeError: ``qconfig`` is None or no QConfig.
            ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another
                axis than 1 or don't divide the length of a row.
        """
        self.qconfig = qconfig = checked_qconfig(self, qconfig)
        for name in weight_names(self):
            weight = cast(Tensor, getattr(self, name))
            quantizer = qconfig.weight()
            if isinstance(quantizer, FakeQuantizeBase):
                quantizer.batch_axis = None
            granularity = granularity_of(quantizer)
            if granularity.axis not in (None, 0 if granularity.group is None else 1):
                raise ValueError(
                    f"{name} of {type(self).__name__} has one scale per row, or per group along a row; the weight "
                    f"quantizer keeps them along axis {granularity.axis}"
                )
            if granularity.group is not None and weight.shape[1] % granularity.group:
                raise ValueError(
                    f"{name} of {type(self).__name__} with rows of {weight.shape[1]} can't have groups of "
                    f"{granularity.group}: give this layer smaller groups or one scale per channel, by a QConfigMapping"
                )
            if granularity.axis is not None:
                quantizer.allocate(granularity.count(tuple(weight.shape)))  # type: ignore[operator]
            self.add_module(name + WEIGHT_QUANTIZER, quantizer)
        if isinstance(self, RecurrentForward):
            self.add_quantizers_between([qconfig.activation() for _ in range(layers - 1)])
        self.activation_post_process = qconfig.activation()

    def weight_quantizer(self, name: str) -> nn.Module:
        """Return the quantizer of the weight called ``name``, such as "weight_hh_l0", of a cell "weight_hh".

        Raises:
            KeyError: no weight has this name.
        """
        return cast(nn.Module, self._modules[name + WEIGHT_QUANTIZER])

    def quantized(self, name: str) -> Tensor:
        """Return the parameter ``name``, such as "weight_hh_l0": a weight rounded by its quantizer, a bias as it is.

        In training mode the quantizer also observes the weight.
        """
        value = cast(Tensor, getattr(self, name))
        return cast(Tensor, self.weight_quantizer(name)(value)) if name.startswith("weight") else value

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """Return a new module of this class that shares the parameters of ``mod`` and uses ``mod.qconfig``.

        It has the mode, training or eval, of ``mod``, and its quantizers lie on the device of the parameters.

        Args:
            mod: the float layer or cell; its weights and biases are parameters, not computed by ``weight_norm``.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: ``mod`` is not exactly a :attr:`float_type`, or its ``qconfig`` is missing or no QConfig.
            ValueError: a weight quantizer that :meth:`attach_quantizers` refuses.
        """
        check_float_type(cls, mod, cls.float_type)
        arguments = {name: getattr(mod, name) for name in cls.geometry_names}
        qat: Any = cls(**arguments, device="meta", qconfig=getattr(mod, "qconfig", None))
        for name, parameter in mod.named_parameters(recurse=False):
            setattr(qat, name, parameter)
        device = next(mod.parameters()).device
        for child in qat.children():
            child.to(device)
        return qat.train(mod.training)


_SEQUENCE_GEOMETRY = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_CELL_GEOMETRY = ("input_size", "hidden_size", "bias")


class _QATSequence(QATRecurrent, RecurrentForward):
    """The base of LSTM, GRU and RNN: the constructor."""

    geometry_names: ClassVar[tuple[str, ...]] = _SEQUENCE_GEOMETRY

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        args, qconfig = without_qconfig(args, qconfig)
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig, self.num_layers)


class LSTM(_QATSequence, nn.LSTM):
    """``nn.LSTM`` with fake-quantized weights; the constructor is the float one's, plus ``qconfig=``.

    What each layer hands to the next and the returned sequence are fake-quantized too, and the first layer's input if
    there is a child ``input_fake_quant``, which ``prepare_qat`` adds where needed. ``h_n`` and ``c_n`` are returned in
    float: modules that read them round them.

    Raises:
        TypeError: no QConfig given.
        ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another axis
            than 1 or don't divide the length of a row.

    Source: AIMET's ``QuantizedLSTM``. torch.ao's ``nn.quantizable.LSTM`` rounds gates and states too, and unrolls time.

    Examples:
        >>> import torch, tritonq
        >>> lstm = tritonq.nn.LSTM(4, 8, num_layers=2, bidirectional=True, qconfig=tritonq.get_qconfig())
        >>> y, (h_n, c_n) = lstm(torch.randn(5, 3, 4))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([4, 3, 8]))
    """

    float_type = nn.LSTM
    geometry_names = (*_SEQUENCE_GEOMETRY, "proj_size")


class GRU(_QATSequence, nn.GRU):
    """``nn.GRU`` with fake-quantized weights; the constructor is the float one's, plus ``qconfig=``.

    What each layer hands to the next and the returned sequence are fake-quantized too, and the first layer's input if
    there is a child ``input_fake_quant``, which ``prepare_qat`` adds where needed. ``h_n`` is returned in float:
    modules that read it round it.

    Raises:
        TypeError: no QConfig given.
        ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another axis
            than 1 or don't divide the length of a row.

    Examples:
        >>> import torch, tritonq
        >>> y, h_n = tritonq.nn.GRU(4, 8, batch_first=True, qconfig=tritonq.get_qconfig())(torch.randn(3, 5, 4))
        >>> y.shape, h_n.shape
        (torch.Size([3, 5, 8]), torch.Size([1, 3, 8]))
    """

    float_type = nn.GRU


class RNN(_QATSequence, nn.RNN):
    """``nn.RNN`` with fake-quantized weights; the constructor is the float one's, plus ``qconfig=``.

    What each layer hands to the next and the returned sequence are fake-quantized too, and the first layer's input if
    there is a child ``input_fake_quant``, which ``prepare_qat`` adds where needed. ``h_n`` is returned in float:
    modules that read it round it.

    Raises:
        TypeError: no QConfig given.
        ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another axis
            than 1 or don't divide the length of a row.

    Examples:
        >>> import torch, tritonq
        >>> y, h_n = tritonq.nn.RNN(4, 8, nonlinearity="relu", qconfig=tritonq.get_qconfig())(torch.randn(5, 3, 4))
        >>> y.shape
        torch.Size([5, 3, 8])
    """

    float_type = nn.RNN
    geometry_names = (*_SEQUENCE_GEOMETRY, "nonlinearity")


class _QATCell(QATRecurrent, RecurrentCellForward):
    """The base of LSTMCell, GRUCell and RNNCell: the constructor."""

    geometry_names: ClassVar[tuple[str, ...]] = _CELL_GEOMETRY

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        args, qconfig = without_qconfig(args, qconfig)
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig, 1)


class LSTMCell(_QATCell, nn.LSTMCell):
    """``nn.LSTMCell`` with fake-quantized weights and returned hidden state; its arguments, plus ``qconfig=``.

    :class:`QATRecurrent` describes the quantizers. The input is rounded only if there is a child ``input_fake_quant``,
    which ``prepare_qat`` adds where needed. The cell state is returned in float.

    Raises:
        TypeError: no QConfig given.
        ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another axis
            than 1 or don't divide the length of a row.

    Examples:
        >>> import torch, tritonq
        >>> h, c = tritonq.nn.LSTMCell(4, 8, qconfig=tritonq.get_qconfig())(torch.randn(3, 4))
        >>> h.shape, c.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    float_type = nn.LSTMCell


class GRUCell(_QATCell, nn.GRUCell):
    """``nn.GRUCell`` with fake-quantized weights and returned hidden state; its arguments, plus ``qconfig=``.

    :class:`QATRecurrent` describes the quantizers. The input is rounded only if there is a child ``input_fake_quant``,
    which ``prepare_qat`` adds where needed.

    Raises:
        TypeError: no QConfig given.
        ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another axis
            than 1 or don't divide the length of a row.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.GRUCell(4, 8, qconfig=tritonq.get_qconfig())(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    float_type = nn.GRUCell


class RNNCell(_QATCell, nn.RNNCell):
    """``nn.RNNCell`` with fake-quantized weights and returned hidden state; its arguments, plus ``qconfig=``.

    :class:`QATRecurrent` describes the quantizers. The input is rounded only if there is a child ``input_fake_quant``,
    which ``prepare_qat`` adds where needed.

    Raises:
        TypeError: no QConfig given.
        ValueError: weights with one scale per index of another axis than 0, or with groups that lie along another axis
            than 1 or don't divide the length of a row.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.RNNCell(4, 8, qconfig=tritonq.get_qconfig())(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    float_type = nn.RNNCell
    geometry_names = (*_CELL_GEOMETRY, "nonlinearity")
