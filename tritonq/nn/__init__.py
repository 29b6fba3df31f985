"""Quantization-aware modules: each takes the place of the float module of its name and shares its parameters."""

from torch import nn

from tritonq.nn import intrinsic
from tritonq.nn.average_pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    Average,
    AverageLayer,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
)
from tritonq.nn.concatenation import Cat
from tritonq.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    ConvTranspose2d,
    ConvTransposeReLU2d,
)
from tritonq.nn.conv_bn import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnReLU1d,
    ConvBnReLU2d,
    ConvBnReLU3d,
    ConvTransposeBn2d,
    ConvTransposeBnReLU2d,
    LinearBn1d,
    LinearBnReLU1d,
)
from tritonq.nn.einsum import Einsum
from tritonq.nn.elementwise import (
    Add,
    DeQuantStub,
    FloatFunctional,
    Joint,
    Maximum,
    Minimum,
    Mul,
    QuantStub,
    Sub,
)
from tritonq.nn.embedding import Embedding, EmbeddingBag
from tritonq.nn.fixed_point import FixedPointConv2d, FixedPointConvBn2d, FixedPointLinear
from tritonq.nn.fixed_point_joins import FixedPointAdd, FixedPointAvgPool2d, FixedPointMaxPool2d
from tritonq.nn.linear import Linear, LinearReLU
from tritonq.nn.products import AddMatMul, MatMul, ScaledDotProductAttention
from tritonq.nn.qat import QATLayer
from tritonq.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, QATRecurrent, RNNCell
from tritonq.nn.repvgg import QATRepVGGBlock, RepVGGBlock
from tritonq.nn.unary import UnaryLayer

# What `prepare_qat` swaps, as in torch.ao: float type to quantization-aware type.
DEFAULT_QAT_MAPPING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.Linear: Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: Linear,
    nn.Embedding: Embedding,
    nn.EmbeddingBag: EmbeddingBag,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
    intrinsic.ConvBn1d: ConvBn1d,
    intrinsic.ConvBn2d: ConvBn2d,
    intrinsic.ConvBn3d: ConvBn3d,
    intrinsic.ConvBnReLU1d: ConvBnReLU1d,
    intrinsic.ConvBnReLU2d: ConvBnReLU2d,
    intrinsic.ConvBnReLU3d: ConvBnReLU3d,
    intrinsic.ConvReLU1d: ConvReLU1d,
    intrinsic.ConvReLU2d: ConvReLU2d,
    intrinsic.ConvReLU3d: ConvReLU3d,
    intrinsic.ConvTransposeBn2d: ConvTransposeBn2d,
    intrinsic.ConvTransposeBnReLU2d: ConvTransposeBnReLU2d,
    intrinsic.ConvTransposeReLU2d: ConvTransposeReLU2d,
    intrinsic.LinearReLU: LinearReLU,
    intrinsic.LinearBn1d: LinearBn1d,
    intrinsic.LinearBnReLU1d: LinearBnReLU1d,
    RepVGGBlock: QATRepVGGBlock,
}

__all__ = [
    "DEFAULT_QAT_MAPPING",
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "Add",
    "AddMatMul",
    "Average",
    "AverageLayer",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Cat",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "ConvTranspose2d",
    "ConvTransposeBn2d",
    "ConvTransposeBnReLU2d",
    "ConvTransposeReLU2d",
    "DeQuantStub",
    "Einsum",
    "Embedding",
    "EmbeddingBag",
    "FixedPointAdd",
    "FixedPointAvgPool2d",
    "FixedPointConv2d",
    "FixedPointConvBn2d",
    "FixedPointLinear",
    "FixedPointMaxPool2d",
    "FloatFunctional",
    "GRUCell",
    "Joint",
    "LSTMCell",
    "Linear",
    "LinearBn1d",
    "LinearBnReLU1d",
    "LinearReLU",
    "MatMul",
    "Maximum",
    "Minimum",
    "Mul",
    "QATLayer",
    "QATRecurrent",
    "QATRepVGGBlock",
    "QuantStub",
    "RNNCell",
    "RepVGGBlock",
    "ScaledDotProductAttention",
    "Sub",
    "UnaryLayer",
    "intrinsic",
]
