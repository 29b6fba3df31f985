"""Files of a version of the project, and what its models computed: later versions must read them alike.

``python -m golden.files DIRECTORY``, run in ``tests`` with the code of the version, writes them: state dicts of
prepared models, whole prepared models, converted models, a mapping of qconfigs, and ``expected.pt`` with the outputs.
"""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonq
from golden.inputs import fill, values
from golden.models import SHAPE, FixedPoint, Residual, Upsampled, prepared, qconfig_of
from golden.run import bits
from golden.training import trained_and_evaluated

# By the name of their files: the float model and its preset.
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual_tensorrt": (Residual, "tensorrt"),
    "residual_x86": (Residual, "x86/1"),
    "residual_tqt": (Residual, "megengine_tqt"),
    "upsampled_qnnpack": (Upsampled, "qnnpack/1"),
    "fixed_point_f8net": (FixedPoint, "f8net"),
}
# Those that are pickled whole, too.
PICKLED = ("residual_tensorrt", "fixed_point_f8net")
PRESETS = ("tensorrt", "megengine_ema", "megengine_tqt", "megengine_calibration", "f8net", "x86/0", "qnnpack/1")


def inputs() -> Tensor:
    """Return what the models are called with."""
    return values(*SHAPE, seed=60)


# Factories that no preset has.
WRITTEN = tritonq.QConfig(
    tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver, dtype=torch.quint8),
    tritonq.FakeQuantize.with_args(
        observer=tritonq.PerChannelMinMaxObserver, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0
    ),
)


def mapping() -> tritonq.QConfigMapping:
    """Return a mapping with a rule of each kind."""
    rules = tritonq.QConfigMapping().set_global(qconfig_of("tensorrt")).set_object_type(nn.Linear, None)
    rules = rules.set_module_name("written", WRITTEN)
    for preset in PRESETS:
        rules = rules.set_module_name(preset.replace("/", "_"), qconfig_of(preset))
    return rules


def frozen_layer() -> nn.Module:
    """Return a layer with a frozen BatchNorm, which its state dict says."""
    return fill(tritonq.nn.ConvBnReLU2d(3, 4, 3, bias=True, qconfig=qconfig_of("tensorrt")))


@torch.no_grad()
def results_of(model: nn.Module) -> dict[str, str]:
    """Return a hash of what each module of ``model`` returns in eval mode, by name; ``""`` is the model."""
    results: dict[str, str] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                results[name] = bits({"": output})

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    model.eval()(inputs())
    for handle in handles:
        handle.remove()
    return results


def save(content: Any, file: Path) -> None:
    """Write ``content`` as ``torch.save`` does, compressed."""
    with gzip.open(file, "wb") as stream:
        torch.save(content, stream)


def load(file: Path, weights_only: bool = True) -> Any:
    """Read a file of :func:`save`."""
    with gzip.open(file) as stream:
        return torch.load(io.BytesIO(stream.read()), weights_only=weights_only)


def main(folder: Path) -> None:
    """Write the files."""
    folder.mkdir(parents=True)
    expected: dict[str, dict[str, str]] = {}
    for name, (kind, preset) in MODELS.items():
        model = prepared(kind(), preset)
        trained_and_evaluated(model, *SHAPE)
        save(model.state_dict(), folder / f"{name}.qat.pt.gz")
        if name in PICKLED:
            save(model, folder / f"{name}.pickle.pt.gz")
        converted = tritonq.convert(model)
        tritonq.save_converted(converted, folder / f"{name}.converted.pt")
        expected[f"{name}.qat"] = {"": results_of(model)[""]}
        expected[f"{name}.converted"] = results_of(converted)
    layer = frozen_layer().freeze_bn_stats()
    trained_and_evaluated(layer, *SHAPE)
    save(layer.state_dict(), folder / "frozen.qat.pt.gz")
    expected["frozen.qat"] = {"": results_of(layer)[""]}
    tritonq.save_qconfig_mapping(mapping(), folder / "mapping.json")
    torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
