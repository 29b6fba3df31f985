"""Lower programs of ``export_program(form="pt2e")`` with ExecuTorch's XNNPACK delegate, run them, and write a table.

    ENV/bin/python tools/delegates.py            # EXECUTORCH.md; ENV has ExecuTorch, torchvision and tritonq

Counted are the layers of each program that the delegate takes, and the codes of the model's outputs that its runtime
gives. The models ran some steps on noise; the images are new noise.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import importlib
import importlib.metadata
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import tritonq
from markdown_table import markdown_table
from tritonq.deploy.modules import Quantizer
from tritonq.perf.cases.vision_models import torchvision_model

TABLE = Path(__file__).resolve().parent.parent / "EXECUTORCH.md"
MODELS = ("resnet18", "mobilenet_v2")
IMAGES, SIZE, STEPS = 4, 64, 3
# Operators that deployment is about, in a program of torch.export, by what the table calls them.
LAYERS = {
    "aten.conv2d.default": "convolutions",
    "aten.linear.default": "linear layers",
    "aten.add.Tensor": "additions",
}
# What ExecuTorch's dialect calls the same where the delegate left them.
LEFT = {
    "aten.convolution.default": "convolutions",
    "aten.linear.default": "linear layers",
    "aten.addmm.default": "linear layers",
    "aten.add.Tensor": "additions",
}
HEAD = (
    *("model", *dict.fromkeys(LAYERS.values()), "codes", "differ in the program", "differ in the runtime"),
    "predictions that agree",
)


def main() -> None:
    """Lower, run and count each model, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(name) for name in MODELS]
    TABLE.write_text("\n".join([*introduction(), *markdown_table(HEAD, rows), ""]))


def measure(name: str) -> list[str]:
    """Return the cells of a model's row in the table."""
    model, images = trained(name)
    converted = tritonq.convert(model)
    program = tritonq.export_program(converted, None, images[:1], dynamic_batch=False, form="pt2e")
    made = count(program.graph, LAYERS)
    if count(lower(program, delegated=False).exported_program().graph, LEFT) != made:
        raise RuntimeError(f"{name}: ExecuTorch's dialect has other operators than the {dict(made)} of the program")
    lowered = lower(program)
    left = count(lowered.exported_program().graph, LEFT)
    with torch.no_grad():
        expected = torch.cat([converted(image[None]) for image in images])
        alone = torch.cat([program.module()(image[None]) for image in images])
    outputs = torch.cat(run(lowered, [image[None] for image in images]))
    scale = last_quantizer(converted).scale
    steps = [((found - expected) / scale).round().abs() for found in (alone, outputs)]
    agreeing = int((outputs.argmax(1) == expected.argmax(1)).sum())
    taken = [
        f"{made[kind] - left[kind]} of {made[kind]}" if made[kind] else "" for kind in dict.fromkeys(LAYERS.values())
    ]
    codes = [f"{int((differing > 0).sum())} by at most {int(differing.max())}" for differing in steps]
    cells = [name, *taken, f"{outputs.numel():,}", *codes, f"{agreeing} of {len(images)}"]
    print(*cells, sep=" | ", flush=True)
    return cells


def trained(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a model in eval mode after some steps on noise, and images."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    net = torchvision_model(name, 10)
    model = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig("xnnpack"), example_inputs=images[:2]).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return model.eval(), torch.randn(IMAGES, 3, SIZE, SIZE)


def lower(program: Any, delegated: bool = True) -> Any:
    """Return the program in ExecuTorch's dialect.

    With ``delegated``, everything that XNNPACK's partitioner takes is a call of the delegate.
    """
    partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir = importlib.import_module("executorch.exir")
    partitioners = [partitioner.XnnpackPartitioner()] if delegated else []
    return exir.to_edge_transform_and_lower(copy.deepcopy(program), partitioner=partitioners)


def run(lowered: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of ExecuTorch's runtime, one for each input."""
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(lowered.to_executorch().buffer)
        method = runtime.load_program(path).load_method("forward")
        return [method.execute([x.contiguous()])[0].clone() for x in inputs]


def count(graph: Any, kinds: dict[str, str]) -> collections.Counter[str]:
    """Return how many nodes of each kind a graph has; ``kinds`` maps names of operators to kinds."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    # ExecuTorch's operators show as "<EdgeOpOverload: aten.add.Tensor>: schema = …".
    names = [name.removeprefix("<EdgeOpOverload: ").partition(">")[0] for name in names]
    return collections.Counter(kinds[name] for name in names if name in kinds)


def last_quantizer(converted: torch.nn.Module) -> Quantizer:
    """Return the quantizer of the model's output."""
    return [module for module in converted.modules() if isinstance(module, Quantizer)][-1]


def introduction() -> list[str]:
    """Return the lines above the table."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("executorch", "torch"))
    return [
        "# ExecuTorch",
        "",
        f'Programs of `export_program(form="pt2e")`, preset `xnnpack`, tritonq {tritonq.__version__}, lowered with the',
        f"XNNPACK partitioner and run by {versions}, {datetime.date.today()}. Counted are the layers that",
        "the delegate takes, and the codes of the outputs that differ from those of the converted model.",
        "`make executorch` repeats it.",
        "",
    ]


if __name__ == "__main__":
    main()
