"""Small whole models: every preset, conversion, files and ONNX graphs."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonq
from golden.inputs import fill, values
from golden.operators import Case
from golden.training import trained_and_evaluated

SHAPE = (4, 3, 8, 8)
_PRESETS = (
    *("tensorrt", "a16w8"),
    *("megengine_min_max", "megengine_ema", "megengine_lowbit", "megengine_sync_ema", "megengine_calibration"),
    *("megengine_tqt", "megengine_passive"),
)
_ENGINES = ("fbgemm", "x86", "qnnpack", "onednn")


class Residual(nn.Module):
    """Convolutions with BatchNorm, additions behind ReLU, ReLU6 and nothing, a concatenation, pooling, a linear head.

    It has no reduction of floating-point numbers outside of layers, so that a converted model's codes are exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.bounded = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.signed = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.MaxPool2d(4)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.point(torch.relu(self.bn(self.depthwise(x)))) + x)
        x = self.bounded(x) + self.signed(x)
        x = F.relu6(x + self.signed(x))
        return self.head(self.pool(torch.cat([x, self.point(x)], 1)).flatten(1))


class Upsampled(nn.Module):
    """Transposed convolutions, a plain convolution with ReLU, a linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
        self.bn = nn.BatchNorm2d(4)
        self.out = nn.ConvTranspose2d(4, 3, 3, padding=1)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(F.relu(self.bn(self.up(self.down(x)))))
        return self.linear(torch.relu(self.linear(x)))


class FixedPoint(nn.Module):
    """Every kind of join of a fixed-point network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.row(3, 8)
        self.max_pool = nn.MaxPool2d(2)
        self.a1, self.a2 = self.row(8, 8), self.row(8, 8)
        self.bottleneck, self.expand = self.row(8, 4, 1), self.row(4, 6, 1)
        self.head = nn.Linear(6, 3)

    @staticmethod
    def row(n_in: int, n_out: int, kernel: int = 3) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool(F.relu(self.stem(x)))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu6(self.expand(self.bottleneck(x)))
        return self.head(x.mean((2, 3)))


def qconfig_of(preset: str) -> tritonq.QConfig:
    """Return a preset by its name; torch.ao's are called engine/version."""
    engine, _, version = preset.partition("/")
    return tritonq.get_default_qat_qconfig(engine, int(version)) if version else tritonq.get_qconfig(preset)


def prepared(model: nn.Module, preset: str) -> nn.Module:
    """Return ``model`` prepared with a preset; passive observers are given scales."""
    model = tritonq.prepare_qat(fill(model), qconfig=qconfig_of(preset), example_inputs=values(*SHAPE))
    for module in model.modules():
        if isinstance(module, tritonq.PassiveObserver):
            module.set_qparams(torch.tensor([0.0625]))
    return model


def _deployed(model: nn.Module, float_model: nn.Module) -> dict[str, Any]:
    """What conversion, verification and a file of the converted model give."""
    x = values(*SHAPE, seed=50)
    converted = tritonq.convert(model)
    with tempfile.TemporaryDirectory() as folder:
        tritonq.save_converted(converted, Path(folder) / "model.pt")
        loaded = tritonq.load_converted(Path(folder) / "model.pt", float_model)
    report = tritonq.verify(model, converted, x)
    codes = [(layer.name, layer.codes, layer.differing) for layer in report.layers]
    with torch.no_grad():
        return {
            "converted": [converted(x), loaded(x)],
            "converted state": converted.state_dict(),
            "verified": repr(codes),
        }


def _preset(kind: type[nn.Module], preset: str) -> dict[str, Any]:
    model = prepared(kind(), preset)
    if preset == "megengine_calibration":
        tritonq.calibrate(model, [(values(*SHAPE, seed=seed),) for seed in range(3)])
    parts = trained_and_evaluated(model, *SHAPE)
    return parts | _deployed(model, kind())


def _fixed_point_phases() -> dict[str, Any]:
    model = prepared(FixedPoint(), "f8net")
    parts: dict[str, Any] = {}
    for phase in ("floating_wo_clip", "floating", "fixed"):
        tritonq.set_fixed_point_phase(model, phase)
        parts |= {f"{phase} {name}": part for name, part in trained_and_evaluated(model, *SHAPE).items()}
    return parts


def _calibrated() -> dict[str, Any]:
    model = prepared(Residual(), "tensorrt")
    data = [values(*SHAPE, seed=seed) for seed in range(2)]
    tritonq.calibrate(model, data)
    factors = tritonq.refine_scales(model, data[:1], candidates=4)
    return {"factors": factors, "state": model.state_dict(), "eval": model.eval()(data[0]).detach()}


def _autocast() -> dict[str, Any]:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = prepared(Residual(), "tensorrt")

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x).float()

    return trained_and_evaluated(Cast(), *SHAPE)


def _mapping() -> dict[str, Any]:
    mapping = tritonq.QConfigMapping().set_global(qconfig_of("tensorrt"))
    for i, name in enumerate([*_PRESETS, *(f"{engine}/{version}" for engine in _ENGINES for version in (0, 1))]):
        mapping = mapping.set_module_name(f"layer{i}", qconfig_of(name))
    with tempfile.TemporaryDirectory() as folder:
        tritonq.save_qconfig_mapping(mapping, Path(folder) / "mapping.json")
        return {"text": (Path(folder) / "mapping.json").read_text()}


def _onnx(kind: type[nn.Module], preset: str, **options: Any) -> dict[str, Any]:
    import onnx

    model = prepared(kind(), preset)
    trained_and_evaluated(model, *SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        tritonq.export_onnx(model, path, values(*SHAPE), **options)
        graph = onnx.load(path).graph
    constants = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    numbers = {name: f"input {i}" for i, name in enumerate([value.name for value in graph.input])}
    lines, used = [], []
    for node in graph.node:
        operands = []
        for name in node.input:
            if name in constants and name not in numbers:
                numbers[name] = f"constant {len(used)}"
                used.append(constants[name])
            operands.append(numbers[name] if name else "")
        for name in node.output:
            numbers[name] = f"value {len(numbers)}"
        attributes = []
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            if attribute.type == onnx.AttributeProto.TENSOR:
                used.append(torch.from_numpy(onnx.numpy_helper.to_array(attribute.t).copy()))
                attributes.append(f"{attribute.name}=constant {len(used) - 1}")
            else:
                attributes.append(f"{attribute.name}={onnx.helper.get_attribute_value(attribute)}")
        lines.append(f"{node.domain} {node.op_type}({', '.join(operands)}) {' '.join(attributes)}")
    lines += [numbers[value.name] for value in graph.output]
    return {"graph": "\n".join(lines), "constants": used}


def _pickled() -> dict[str, Any]:
    model = prepared(Residual(), "tensorrt")
    parts = trained_and_evaluated(model, *SHAPE)
    file, x = io.BytesIO(), values(*SHAPE, seed=51)
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        return {
            "loaded": torch.load(file, weights_only=False)(x),
            "copy": copy.deepcopy(model)(x),
            "original": model(x),
            "state": parts["state"],
        }


def cases() -> Iterator[Case]:
    """Name and computation of every model's cases."""
    presets = [*_PRESETS, *(f"{engine}/{version}" for engine in _ENGINES for version in (0, 1))]
    for preset in presets:
        yield f"Residual/{preset}", lambda p=preset: _preset(Residual, p)
    for preset in ("tensorrt", "qnnpack/1"):
        yield f"Upsampled/{preset}", lambda p=preset: _preset(Upsampled, p)
    yield "FixedPoint/f8net", lambda: _preset(FixedPoint, "f8net")
    yield "FixedPoint/phases", _fixed_point_phases
    yield "Residual/calibrated", _calibrated
    yield "Residual/autocast", _autocast
    yield "Residual/pickled", _pickled
    yield "mapping", _mapping
    yield "onnx/Residual/onnxruntime", lambda: _onnx(Residual, "tensorrt", target="onnxruntime")
    yield "onnx/Residual/tensorrt", lambda: _onnx(Residual, "tensorrt", target="tensorrt")
    yield "onnx/Upsampled", lambda: _onnx(Upsampled, "x86/1")
    yield "onnx/FixedPoint", lambda: _onnx(FixedPoint, "f8net")
