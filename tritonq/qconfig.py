"""Which quantizers a layer gets: QConfig, presets for engines, torch.ao's presets and those of other systems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from tritonq.factory import Factory
from tritonq.fake_quantize import FakeQuantize
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.learned_bits import LearnedBitsFakeQuantize
from tritonq.learned_fake_quantize import Initialization, LearnedStepFakeQuantize, TrainedThresholdFakeQuantize
from tritonq.near_misses import did_you_mean
from tritonq.observers import (
    InterpolatingHistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PassiveObserver,
    PerChannelMinMaxObserver,
)
from tritonq.paper_schemes import BinaryWeight, DoReFaActivation, DoReFaWeight, TernaryWeight
from tritonq.qparams import RangeRule
from tritonq.quantized_type import QINT4, QINT8, QINT8_NARROW, QUINT8, QuantizedType
from tritonq.targets import Target, find_target

# How training folds a BatchNorm into the quantized weight; see `tritonq.nn.batch_norm_layer.QATBatchNormLayer`.
Folding = Literal["approximate", "exact", "corrected", "scale"]
# Where softmax and norms read and write rounded values.
Islands = Literal["float", "rounded"]


class QConfig(NamedTuple):
    """Factories of the fake quantizers for a layer's output and for its weight, and the engine that they are made for.

    Each call of a factory, such as ``FakeQuantize.with_args(...)``, gives a new instance. ``nn.Identity`` as a factory
    leaves that side in float.

    Attributes:
        activation: makes the quantizer of a layer's output.
        weight: makes the quantizer of a layer's weight.
        target: a name in :data:`tritonq.targets.TARGETS`. It decides where a model is rounded and which file
            ``export_onnx`` writes. None stands for ONNX Runtime.
        round_summands: False: if only an addition reads a layer's result, it is not rounded before the addition, but
            behind it, with the sum. That costs less accuracy at few bits. ONNX Runtime then computes the layer in
            float, TensorRT fuses it with the addition. It needs ``example_inputs``. True: summands are rounded.
        folding: how layers with a BatchNorm fold it in training (``"scale"`` suits trained scales, see
            :class:`tritonq.nn.batch_norm_layer.QATBatchNormLayer`); None means ``"approximate"``.
        islands: where the tensors around softmax and norms, which compute in float, are rounded. None: where a
            quantized operation makes or reads them; ``"float"``: not before them, so that a softmax reads scores, and a
            GELU the layer's result, in float; ``"rounded"``: everywhere. It needs ``example_inputs``.

    Source: torch.ao.quantization.QConfig; target, round_summands, folding and islands are tritonq's.

    Examples:
        >>> import tritonq
        >>> eight = tritonq.FakeQuantize.with_args(dtype="qint8")
        >>> qconfig = tritonq.QConfig(activation=nn.Identity, weight=eight)
        >>> qconfig.weight().qtype.bits, qconfig.target
        (8, None)
    """

    activation: Callable[..., nn.Module]
    weight: Callable[..., nn.Module]
    target: str | None = None
    round_summands: bool = True
    folding: Folding | None = None
    islands: Islands | None = None

    def find_target(self) -> Target:
        """Return the :class:`~tritonq.targets.Target` that ``target`` names; None names the default one.

        Raises:
            ValueError: an unknown name.
        """
        return find_target(self.target)


# Observers of one range in the place of those of one per channel.
_PER_TENSOR: dict[type[nn.Module], type[nn.Module]] = {
    MovingAveragePerChannelMinMaxObserver: MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver: MinMaxObserver,
}


def with_one_weight_scale(qconfig: QConfig) -> QConfig:
    """Return a copy of ``qconfig`` whose weights have one scale instead of one per channel.

    Transposed convolutions need it for engines that take no scale per channel there.

    ``qconfig`` itself is returned if its factory of weights is not made by ``with_args``, as a user's own function, or
    has no observer of minimum and maximum per channel.
    """
    factory = qconfig.weight
    observer = _PER_TENSOR.get(factory.arguments.get("observer")) if isinstance(factory, Factory) else None  # type: ignore[arg-type]
    if observer is None or not isinstance(factory, Factory):
        return qconfig
    kept = {name: value for name, value in factory.arguments.items() if name not in ("qscheme", "ch_axis")}
    dtype = factory().qtype.with_axis(None)
    return qconfig._replace(weight=Factory(factory.make, {**kept, "observer": observer, "dtype": dtype}))


# torch.ao's weight quantizers: moving averages, as there, signed 8 bits.
_TORCH_WEIGHT = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0, **_TORCH_WEIGHT
)
default_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, **_TORCH_WEIGHT
)
default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    dtype=torch.quint8,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
)
# One row, one scale; torch.ao uses float zero points here, tritonq integer ones.
default_embedding_fake_quant = FakeQuantize.with_args(
    observer=PerChannelMinMaxObserver, dtype=torch.quint8, qscheme=torch.per_channel_affine, ch_axis=0
)

# Deployment engine: (reduce_range of activations, weights per channel).
TORCH_BACKENDS = {
    "fbgemm": (True, True),
    "x86": (True, True),
    "qnnpack": (False, False),
    "onednn": (False, True),
}


def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """Return torch.ao's QAT preset for a deployment engine.

    Activations: unsigned affine, moving average, 0..127 for fbgemm and x86, 0..255 for qnnpack and onednn. Weights:
    signed symmetric -128..127, per channel except for qnnpack.

    Args:
        backend: ``"fbgemm"``, ``"x86"``, ``"qnnpack"`` or ``"onednn"``; also the qconfig's ``target``.
        version: 0: scales as torch.ao's observers compute them; 1: as its fused operator (rule ``"torch_v1"``).

    Raises:
        ValueError: unknown backend or version.

    Source: torch.ao.quantization.get_default_qat_qconfig; docs/numbers.md, "From a range to a scale".

    Examples:
        >>> qtype = get_default_qat_qconfig("x86").activation().qtype
        >>> qtype.quant_min, qtype.quant_max, qtype.symmetric
        (0, 127, False)
    """
    if backend not in TORCH_BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(TORCH_BACKENDS)}")
    if version not in (0, 1):
        raise ValueError(f"version must be 0 or 1, got {version}")
    reduce_range, per_channel = TORCH_BACKENDS[backend]
    weight = default_per_channel_weight_fake_quant if per_channel else default_weight_fake_quant
    # Version 1 uses a fused operator with range arithmetic of its own, which is part of its numbers.
    rule: dict[str, RangeRule] = {"rule": "torch_v1"} if version == 1 else {}
    return QConfig(default_fake_quant.with_args(reduce_range=reduce_range, **rule), weight.with_args(**rule), backend)


def _megengine(observer: Any, qtype: QuantizedType, **arguments: Any) -> Factory[FakeQuantize]:
    """Return a factory of fake quantizers with MegEngine's arithmetic: its range rule, ties away from zero.

    ``arguments`` go to the observer.
    """
    return FakeQuantize.with_args(observer=observer, dtype=_ties_away(qtype), rule="megengine", **arguments)


def _ties_away(qtype: QuantizedType) -> QuantizedType:
    return replace(qtype, rounding="half_away")


def _observing(quantizer: Factory[FakeQuantize]) -> Factory[FakeQuantize]:
    """Return a factory of the same quantizers that begin with rounding switched off and observe only."""
    return Factory(observe_only, {"quantizer": quantizer})


def observe_only(quantizer: Callable[..., FakeQuantize], **arguments: Any) -> FakeQuantize:
    """Return ``quantizer(**arguments)``, which only observes until ``enable_fake_quant`` or ``tritonq.calibrate``.

    The preset ``"megengine_calibration"`` makes its quantizers by it; ``quantizer`` is their class or factory.
    """
    made = quantizer(**arguments)
    made.disable_fake_quant()
    return made


# MegEngine keeps 0.9 of the old range.
_EMA = {"averaging_constant": 0.1}

# Where a residual branch starts at 0, 1.5 keeps up with float training and 2 does not; batches of a trained network
# differ by less.
_COPY_ABOVE = 1.5

# One scale per output channel, no code -128; the range is that of the present weight, with no memory of larger ones.
_NARROW_WEIGHT = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    dtype="qint8_narrow",
    qscheme=torch.per_channel_symmetric,
    averaging_constant=1.0,
    ch_axis=0,
)
_UNSIGNED_ACTIVATION = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, dtype=QUINT8, copy_above=_COPY_ABOVE
)


def learned_step_qconfig(weight_bits: int, activation_bits: int, init: Initialization = "lsq") -> QConfig:
    """Return the qconfig of LSQ for weights and activations of so many bits.

    Scales are trained: one per output channel of a weight (signed, symmetric), one per activation (unsigned, with a
    zero point). ``init`` says how they begin: ``"lsq"``, by LSQ's formula; ``"mse"``, with the least squared error;
    ``"observer"``, from the observed range. Weights are rounded before they are multiplied by their BatchNorm's factor;
    summands are not rounded, but their sum is. The target is ONNX Runtime.

    Raises:
        TypeError: bits that are no whole number.
        ValueError: bits outside 1..32.
    """
    step = LearnedStepFakeQuantize.with_args(init=init)
    activation = step.with_args(dtype=QuantizedType.of(activation_bits, signed=False, symmetric=False))
    return _unfolded(step.with_args(dtype=QuantizedType.of(weight_bits, axis=0)), activation)


def _floats(format: str, *, per_channel: bool = False) -> QConfig:
    """Return a qconfig whose weights and activations have one float format.

    The scale of a weight follows from its present values. ``per_channel``: formats of single elements, with a scale per
    output channel; else formats of blocks, which run along the input channels.
    """
    quantizer = FloatFakeQuantize.with_args(format=format)
    return QConfig(quantizer, quantizer.with_args(ch_axis=0 if per_channel else 1, history=1))


def _wide_activations(weight_bits: int) -> QConfig:
    """Return a qconfig for QNN: 16-bit activations with a zero point, narrow weights of so many bits per channel."""
    return QConfig(
        _UNSIGNED_ACTIVATION.with_args(dtype=QuantizedType.of(16, signed=False, symmetric=False)),
        _NARROW_WEIGHT.with_args(dtype=QuantizedType.of(weight_bits, narrow=True, axis=0)),
        "qnn",
    )


def _grouped(weight_bits: int, group: int, activation: Callable[..., nn.Module]) -> QConfig:
    """Return a qconfig of symmetric weights of so many bits with a scale per ``group`` input channels."""
    qtype = QuantizedType.of(weight_bits, axis=1, group=group)
    observer = MovingAveragePerChannelMinMaxObserver
    weight = FakeQuantize.with_args(observer=observer, dtype=qtype, averaging_constant=1.0)
    return QConfig(activation, weight, "onnxruntime")


def _unfolded(weight: Callable[..., nn.Module], activation: Callable[..., nn.Module]) -> QConfig:
    """Return a qconfig whose weights are rounded before they are multiplied by their BatchNorm's factor.

    Summands of an addition are not rounded, but their sum is; the target is ONNX Runtime.
    """
    return QConfig(activation, weight, "onnxruntime", round_summands=False, folding="scale")


_GROUPS = (32, 64, 128)
# Bits of weights and activations.
_DOREFA_WIDTHS = ((1, 2), (1, 4), (2, 2), (4, 4))
_LEARNED_STEP_WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 3), (2, 4), (2, 2))

PRESETS: dict[str, QConfig] = {
    # Products of unsigned activations and signed weights run fastest on CPUs. Zero is in every range: behind a ReLU the
    # zero point is 0, and all 256 codes are used. An activation's range follows growth at once.
    "onnxruntime": QConfig(_UNSIGNED_ACTIVATION, _NARROW_WEIGHT, "onnxruntime"),
    # Zero points of 0, in activations too.
    "tensorrt": QConfig(
        FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, dtype=QINT8, copy_above=_COPY_ABOVE),
        _NARROW_WEIGHT,
        "tensorrt",
        islands="float",
    ),
    # The default's numbers: OpenVINO and QNN multiply unsigned activations with a zero point and signed weights.
    **{name: QConfig(_UNSIGNED_ACTIVATION, _NARROW_WEIGHT, name) for name in ("openvino", "qnn")},
    # XNNPACK's convolutions with a scale per channel take signed activations alone, with a zero point.
    "xnnpack": QConfig(
        _UNSIGNED_ACTIVATION.with_args(dtype=QuantizedType.of(8, symmetric=False)), _NARROW_WEIGHT, "xnnpack"
    ),
    "megengine_min_max": QConfig(_megengine(MinMaxObserver, QINT8), _megengine(MinMaxObserver, QINT8_NARROW)),
    "megengine_ema": QConfig(
        _megengine(MovingAverageMinMaxObserver, QINT8, **_EMA), _megengine(MinMaxObserver, QINT8_NARROW)
    ),
    "megengine_lowbit": QConfig(
        _megengine(MovingAverageMinMaxObserver, QINT4, **_EMA), _megengine(MinMaxObserver, QINT4)
    ),
    "megengine_sync_ema": QConfig(
        _megengine(MovingAverageMinMaxObserver, QINT8, process_group="auto", **_EMA),
        _megengine(MinMaxObserver, QINT8_NARROW),
    ),
    "megengine_calibration": QConfig(
        _observing(_megengine(InterpolatingHistogramObserver, QINT8, interpolation="megengine")),
        _observing(_megengine(MinMaxObserver, QINT8_NARROW)),
    ),
    "megengine_tqt": QConfig(
        TrainedThresholdFakeQuantize.with_args(dtype=_ties_away(QINT8), rule="megengine"),
        TrainedThresholdFakeQuantize.with_args(dtype=_ties_away(QINT8_NARROW), rule="megengine"),
    ),
    "megengine_passive": QConfig(_megengine(PassiveObserver, QINT8), _megengine(PassiveObserver, QINT8_NARROW)),
    # Fixed point: whether an activation is signed follows from the ReLU before it; weights are searched every forward.
    "f8net": QConfig(FixedPointFakeQuantize.with_args(signed=False), FixedPointFakeQuantize.with_args(momentum=1.0)),
    **{f"a16w{bits}": _wide_activations(bits) for bits in (8, 4)},
    **{f"w4_g{group}": _grouped(4, group, nn.Identity) for group in _GROUPS},
    **{f"w4a8_g{group}": _grouped(4, group, _UNSIGNED_ACTIVATION) for group in _GROUPS},
    "fp8_e4m3": _floats("fp8_e4m3", per_channel=True),
    **{format: _floats(format) for format in ("mxfp8", "mxfp4", "nvfp4")},
    **{f"w_{format}": _floats(format)._replace(activation=nn.Identity) for format in ("mxfp8", "mxfp4", "nvfp4")},
    "learned_bits_a8": _unfolded(LearnedBitsFakeQuantize.with_args(), _UNSIGNED_ACTIVATION),
    "bwn_w1a8": _unfolded(Factory(BinaryWeight), _UNSIGNED_ACTIVATION),
    "twn_w2a8": _unfolded(Factory(TernaryWeight), _UNSIGNED_ACTIVATION),
    **{
        f"dorefa_w{weights}a{activations}": _unfolded(
            Factory(DoReFaWeight, {"bits": weights}), Factory(DoReFaActivation, {"bits": activations})
        )
        for weights, activations in _DOREFA_WIDTHS
    },
    **{
        f"lsq_w{weights}a{activations}": learned_step_qconfig(weights, activations)
        for weights, activations in _LEARNED_STEP_WIDTHS
    },
}
DEFAULT_PRESET = "onnxruntime"


def get_qconfig(name: str = DEFAULT_PRESET) -> QConfig:
    """Return a preset by name.

    - ``"onnxruntime"`` (default): activations unsigned 8-bit with a zero point (0 behind a ReLU) and a moving average
      that follows growth at once (``copy_above``), weights symmetric narrow int8 (-127..127) per channel.
    - ``"tensorrt"``: the same with symmetric int8 activations; the function behind a layer (SiLU and the like) is
      computed before rounding, and tensors before softmax and norms stay in float (``islands="float"``).
    - ``"openvino"``, ``"qnn"``: the numbers of ``"onnxruntime"`` for these engines' files.
    - ``"xnnpack"``: signed 8-bit activations with a zero point, for ExecuTorch's delegate.
    - ``"a16w8"``, ``"a16w4"``: as ``"qnn"`` with activations of 16 bits, and weights of 8 or 4, as Qualcomm's targets
      have them; sums have 64 bits. Train and run in float32, which holds 16-bit codes; float16 and bfloat16 don't.
    - ``"w4_g32"``, ``"w4_g64"``, ``"w4_g128"``: symmetric weights of 4 bits with a scale per group of so many input
      channels, activations in float; ``"w4a8_g32"`` and so on: the same with activations of 8 bits. Groups must divide
      the input channels of each layer; :func:`tritonq.get_qconfig_mapping` leaves them out of the first one.
    - ``"megengine_ema"``, ``"megengine_min_max"``: int8 per tensor, ties away from zero, eps 1e-5.
    - ``"megengine_sync_ema"``: as ``"megengine_ema"``, with ranges over all ranks where torch.distributed is
      initialised.
    - ``"megengine_lowbit"``: weights and activations of 4 bits.
    - ``"megengine_calibration"``: histograms for post-training calibration; nothing is rounded before
      :func:`tritonq.calibrate` has fixed the ranges.
    - ``"megengine_tqt"``: trained thresholds.
    - ``"megengine_passive"``: scales are given, not observed.
    - ``"f8net"``: 8-bit fixed point; between layers values are multiplied by powers of two only.
    - ``"lsq_w8a8"``, ``"lsq_w4a8"``, ``"lsq_w4a4"``, ``"lsq_w3a3"``, ``"lsq_w2a4"``, ``"lsq_w2a2"``: trained scales
      (LSQ) for weights and activations of so many bits, which begin as in the paper. Of an addition the sum is rounded,
      not its summands, and a weight before its BatchNorm multiplies it (``folding="scale"``). First and last layer and
      inputs should have 8 bits: :func:`tritonq.get_qconfig_mapping` gives that mapping.
    - ``"dorefa_w1a2"``, ``"dorefa_w1a4"``, ``"dorefa_w2a2"``, ``"dorefa_w4a4"``: DoReFa-Net, activations between 0 and
      1; ``"bwn_w1a8"``, ``"twn_w2a8"``: binary and ternary weights. Sums, folding and the ends as with LSQ.
    - ``"learned_bits_a8"``: weights of 2 to 8 bits, a trained number per layer (FracBits, over LSQ's trained scales):
      :func:`tritonq.learned_size` gives the penalty, :func:`tritonq.fix_learned_bits` ends the search. Sums,
      folding and the ends as with LSQ.
    - ``"fp8_e4m3"``: floats of 8 bits, weights with a scale per output channel, activations with one that follows from
      the largest magnitudes of 16 batches.
    - ``"mxfp8"``, ``"mxfp4"``, ``"nvfp4"``: blocks of floats of 8 or 4 bits along the input channels. They have no
      deployed form, since blocks of activations find their scales while the model runs; :func:`tritonq.convert` says
      so. ``"w_mxfp8"``, ``"w_mxfp4"``, ``"w_nvfp4"``: the same for weights alone, which have a deployed form if blocks
      divide the channels.

    Raises:
        ValueError: an unknown name, for which the message lists the known ones, or torch.ao's (``"x86"``), for which it
            names :func:`get_default_qat_qconfig`.

    Examples:
        >>> get_qconfig("tensorrt").target, get_qconfig("tensorrt").activation().qtype.symmetric
        ('tensorrt', True)
        >>> get_qconfig().activation().qtype.quant_max
        255
    """
    if name in TORCH_BACKENDS:
        raise ValueError(f"{name!r} is a preset of torch.ao: get_default_qat_qconfig({name!r}) returns it")
    if name not in PRESETS:
        hint = f"get_default_qat_qconfig has torch.ao's {', '.join(TORCH_BACKENDS)}"
        near = did_you_mean(name, PRESETS)
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}; {hint}{near}")
    return PRESETS[name]


# torch.ao's object of this name: weights per tensor, unlike those of the x86 preset.
default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
default_embedding_qat_qconfig = QConfig(activation=nn.Identity, weight=default_embedding_fake_quant)
