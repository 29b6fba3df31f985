"""Run exported models in other engines, layer by layer on the codes that were trained, and write a table.

    python tools/engines.py export FOLDER                     # in the project's environment: models, codes, images
    ENV/bin/python tools/engines.py run FOLDER onnxruntime    # in any environment with NumPy and the engine
    ENV/bin/python tools/engines.py run FOLDER openvino
    python tools/engines.py table FOLDER                      # ENGINES.md, of all results in FOLDER

Each model is exported twice: as users get it, for its predictions, and with its layers apart, so that each reads the
codes that tritonq's layer made and a difference is that of one layer. Only ``run`` needs the engine, and it needs
nothing of tritonq.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from markdown_table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "ENGINES.md"
TARGET = "onnxruntime"
IMAGES, SIZE, STEPS = 16, 64, 10
FORMS = "forms"
TORCHVISION = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet")


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("export", "run", "table"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "run":
            command.add_argument("engine", choices=ENGINES)
    arguments = parser.parse_args()
    if arguments.command == "export":
        export_models(arguments.folder)
    elif arguments.command == "run":
        run_models(arguments.folder, arguments.engine)
    else:
        TABLE.write_text(table(arguments.folder))


def export_models(folder: Path) -> None:
    """Train, export and write each model with its codes on some images."""
    import torch

    import tritonq

    folder.mkdir(parents=True, exist_ok=True)
    for name, model, images in trained_models():
        path = folder / f"{name}.onnx"
        tritonq.export_onnx(model, path, images[:2], target="onnxruntime")
        report = tritonq.verify(model, path, images)
        print(f"{name}: {report.total.differing} of {report.total.codes} codes differ here", flush=True)
        with torch.no_grad():
            outputs = model(images).numpy()
        write_layers(path, images.numpy(), outputs)


def trained_models() -> Iterator[tuple[str, Any, Any]]:
    """Yield name, model in eval mode, and images.

    One model is trained on digits, the others for a few steps on noise.
    """
    import torch
    import torchvision

    import tritonq
    from tritonq.cli.data import load_digits
    from tritonq.demo.model import SmallResNet
    from tritonq.demo.training import train

    digits = load_digits()
    torch.manual_seed(0)
    small = SmallResNet(1, 10)
    train(small, digits, epochs=3, learning_rate=0.05, label="digits")
    qat = tritonq.prepare_qat(small, example_inputs=digits.train_images[:2])
    train(qat, digits, epochs=2, learning_rate=0.005, label="digits, QAT")
    yield "digits", qat.eval(), digits.test_images[:500]
    for name in (*TORCHVISION, FORMS):
        torch.manual_seed(0)
        options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
        net = forms() if name == FORMS else torchvision.models.get_model(name, num_classes=10, **options)
        images = torch.randn(IMAGES, 3, SIZE, SIZE)
        qat = tritonq.prepare_qat(net, example_inputs=images[:2]).train()
        optimizer = torch.optim.SGD(qat.parameters(), 0.01)
        for _ in range(STEPS):
            optimizer.zero_grad()
            qat(images).square().mean().backward()
            optimizer.step()
        yield name, qat.eval(), images


def forms() -> Any:
    """Return a network with operations that the others lack.

    These are SiLU, GELU, transposed and dilated kernels, a difference, and products.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            self.up = nn.ConvTranspose2d(16, 16, 3, 2, 1, 1, groups=4)
            self.dilated = nn.ConvTranspose2d(16, 16, 3, 1, 2, dilation=2)
            self.down, self.strided = nn.Conv2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 16, 3, 2, 3, 1, dilation=2)
            self.queries, self.keys, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.norm(self.stem(x)))
            y = F.gelu(self.down(self.up(x)))
            x = F.avg_pool2d(self.dilated(x) - y, 4)
            x = F.relu(self.strided(x))
            tokens = F.max_pool2d(torch.cat([x, x.roll(1, 2)], 3), 4).flatten(2).transpose(1, 2)
            scores = self.queries(tokens) @ self.keys(tokens).transpose(1, 2)
            gated = (scores * tokens.mean(2, keepdim=True)).mean(2, keepdim=True)
            logits: Tensor = self.head(gated.expand(-1, -1, 16).mean(1))
            return logits

    return Forms()


def write_layers(path: Path, images: Any, outputs: Any) -> None:
    """Write a model with its layers apart, and for each layer the codes that it reads and makes, beside its file."""
    import onnx
    import onnxruntime

    from tritonq.deploy.onnx_files import CODES_KEY
    from tritonq.deploy.onnx_layers_apart import given_name, separated

    model = onnx.load(path)
    entries = json.loads(next(entry.value for entry in model.metadata_props if entry.key == CODES_KEY))
    names = list(dict.fromkeys(entry["tensor"] for entry in entries))
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    copied.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(copied.SerializeToString(), providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name
    codes = dict(zip(names, session.run(names, {source: images}), strict=True))
    kinds = {name: (values.dtype, values.ndim) for name, values in codes.items()}
    path.with_suffix(".layers.onnx").write_bytes(separated(model, kinds))
    held = {f"code/{index}": codes[name] for index, name in enumerate(names)}
    index = {"codes": names, "given": [given_name(name) for name in names], "input": source}
    np.savez_compressed(
        path.with_suffix(".npz"), images=images, outputs=outputs, index=np.array(json.dumps(index)), **held
    )


def run_models(folder: Path, engine: str) -> None:
    """Run every model of a folder, and write the differences to ``FOLDER/ENGINE-VERSION.json``."""
    version, load = ENGINES[engine]()
    rows = []
    for path in sorted(folder.glob("*.npz")):
        held = np.load(path)
        index = json.loads(str(held["index"]))
        codes = {name: held[f"code/{place}"] for place, name in enumerate(index["codes"])}
        whole = load(str(path.with_suffix(".onnx")))({index["input"]: held["images"]})
        apart = load(str(path.with_suffix(".layers.onnx")))
        found = apart(
            {index["input"]: held["images"], **dict(zip(index["given"], codes.values(), strict=True))},
        )
        steps = {name: np.abs(found[name].astype(int) - codes[name].astype(int)) for name in codes}
        (outputs,) = whole.values()
        rows.append(
            {
                "model": path.stem,
                "layers": len(codes),
                "codes": sum(values.size for values in codes.values()),
                "differing": int(sum(np.count_nonzero(step) for step in steps.values())),
                "largest": int(max(step.max() for step in steps.values())),
                "worst": max(steps, key=lambda name: (int(steps[name].max()), np.count_nonzero(steps[name]))),
                "predictions": len(outputs),
                "top1": int((outputs.argmax(1) == held["outputs"].argmax(1)).sum()),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "engine": engine,
        "version": version,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    (folder / f"{engine}-{version.split('-')[0]}.json").write_text(json.dumps(result, indent=1))


def load_onnxruntime() -> tuple[str, Callable[[str], Callable[[dict[str, Any]], dict[str, Any]]]]:
    """Return the version of ONNX Runtime, and a function that loads a file with its default optimization.

    What is loaded is a function from inputs to outputs, by name.
    """
    import onnxruntime

    def load(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        options = onnxruntime.SessionOptions()
        if "vnni" not in Path("/proc/cpuinfo").read_text() and platform.machine() == "x86_64":
            options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {entry.name for entry in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]

        def run(feeds: dict[str, Any]) -> dict[str, Any]:
            given = {name: values for name, values in feeds.items() if name in inputs}
            return dict(zip(names, session.run(names, given), strict=True))

        return run

    return onnxruntime.__version__, load


def load_openvino() -> tuple[str, Callable[[str], Callable[[dict[str, Any]], dict[str, Any]]]]:
    """Return the version of OpenVINO, and a function that loads a file for its CPU plugin.

    What is loaded is a function from inputs to outputs, by name.
    """
    openvino: Any = importlib.import_module("openvino")

    core = openvino.Core()

    def load(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        inputs = {name for port in compiled.inputs for name in port.get_names()}

        def run(feeds: dict[str, Any]) -> dict[str, Any]:
            results = compiled({name: values for name, values in feeds.items() if name in inputs})
            return {name: results[port] for port in compiled.outputs for name in port.get_names()}

        return run

    return openvino.__version__, load


ENGINES = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}


def table(folder: Path) -> str:
    """Return the results in a folder as a page of Markdown."""
    from tritonq.version import __version__

    lines = [
        "# Other engines",
        "",
        f'Files of `export_onnx(target="{TARGET}")`, tritonq {__version__}, in other engines than the pinned one:',
        "each layer on the codes that tritonq's layer made, and predictions of the whole file. `digits` is trained,",
        f"the others ran {STEPS} steps on noise. `tools/engines.py` says how to repeat it.",
        "",
    ]
    head = ("engine", "date", "model", "layers", "codes", "differ", "by at most", "worst", "predictions that agree")
    cells: list[tuple[object, ...]] = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        engine = f"{result['engine']} {result['version'].split('-')[0]}"
        for row in result["rows"]:
            worst = row["worst"].removesuffix(".codes") if row["differing"] else ""
            counts = (row["layers"], f"{row['codes']:,}", f"{row['differing']:,}", row["largest"], worst)
            agreeing = f"{row['top1']} of {row['predictions']}"
            cells.append((engine, result["date"], row["model"], *counts, agreeing))
    return "\n".join([*lines, *markdown_table(head, cells), ""])


if __name__ == "__main__":
    main()
