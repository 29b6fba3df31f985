"""Converted models as programs of ``torch.export``: operators of PyTorch alone, loadable without any model code."""

from __future__ import annotations

import io
import os
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.traceback import preserve_node_meta

from tritonq.deploy.as_trained import ready_to_trace
from tritonq.deploy.convert import convert
from tritonq.deploy.embedding_tables import QuantizedTable
from tritonq.deploy.files import atomic_file
from tritonq.deploy.modules import DeployedModule, QuantizedLayer, Quantizer
from tritonq.deploy.output_sizes import with_output_sizes
from tritonq.deploy.outputs import return_no_text
from tritonq.deploy.pt2e_form import complete_pairs, pt2e_form
from tritonq.grid import Grid
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.prepare.record.snapshot import copied
from tritonq.reference.fake_quant import fake_quantize

ProgramForm = Literal["integers", "pt2e"]
"""The forms that :func:`export_program` writes."""


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str] | None,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    form: ProgramForm = "integers",
) -> ExportedProgram:
    """Write a quantization-aware or converted model as a program that ``torch.export.load`` reads.

    - ``"integers"``: its ``module()`` gives the outputs of the converted model bit for bit, under autocast too; it
      holds the integer weights and operators of PyTorch, so that neither tritonq nor the model's source is needed to
      run it. Convolutions that are exact in float32 on the machine that exports (oneDNN on x86) run in float32;
      elsewhere, and where sums may reach 2^24, in float64.
    - ``"pt2e"``: what torchao's ``convert_pt2e`` returns and its back ends lower (ExecuTorch's delegates, torch's
      Inductor): float operators between pairs of ``torch.ops.quantized_decomposed.quantize_per_tensor`` and
      ``dequantize_per_tensor`` with the trained grids, weights int8 (or what else holds their codes) behind
      a ``dequantize_per_channel``, float biases. Weights of transposed convolutions with groups are float. Sums, means
      and functions between pairs are rounded from float: single codes of a layer may differ by one from the trained
      ones. Ties are rounded to even. To load it, ``import torch.ao.quantization.fx._decomposed`` or ExecuTorch first.

    Args:
        model: what :func:`tritonq.convert` takes, or returns; it is not changed.
        path: file to write (under a temporary name, then renamed), ``*.pt2`` by custom; None: write none.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of named ones. The program takes tensors of
            these sizes only, but for the batch.
        dynamic_batch: leave the size of axis 0 open for the first tensor of the inputs, and for all others whose axis 0
            has the same size. False: the program takes batches of the example's size only.
        form: ``"integers"`` or ``"pt2e"``.

    Returns:
        The program.

    Raises:
        ValueError: an unknown form; a model of fixed point, with recurrent layers or with results rounded to a float
            format; in the form of PT2E also codes of more than 16 bits, weights rounded to a float format or with
            a scale per group; a model that torch.export can't trace; arguments or results of a type that it can't save,
            such as named tuples that are not registered; or what :func:`tritonq.convert` raises.
        OSError: the file can't be written.

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> program = export_program(qat.eval(), None, x)
        >>> torch.equal(program.module()(x), qat(x))
        True
        >>> program = export_program(qat.eval(), None, x, form="pt2e")
        >>> sum("quantized_decomposed.quantize" in str(node.target) for node in program.graph.nodes)
        2
    """
    if form not in get_args(ProgramForm):
        raise ValueError(f"unknown form {form!r}; known: {', '.join(get_args(ProgramForm))}")
    model = uncompiled(model)
    deployed = model if any(isinstance(module, DeployedModule) for module in model.modules()) else convert(model)
    for name, module in deployed.named_modules():
        if isinstance(module, DeployedModule) and not isinstance(module, (Quantizer, QuantizedLayer, QuantizedTable)):
            raise ValueError(f"{type(module).__name__} {name!r} has no form in a program of torch.export")
    deployed = with_output_sizes(deployed, example_inputs)
    traced = pt2e_form(deployed) if form == "pt2e" else _program_form(deployed)
    arguments, shapes, result = ready_to_trace(traced, deployed, example_inputs, dynamic_batch)
    return_no_text(traced, result)
    try:
        # So that nodes keep the names of quantizers.
        with torch.no_grad(), preserve_node_meta(form == "pt2e"):
            program = torch.export.export(traced, *arguments, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises what the model, the tracer and its solver of shapes do
        hint = "; dynamic_batch=False may help" if dynamic_batch else ""
        raise ValueError(f"{type(model).__name__} can't be exported{hint}: {error}") from error
    if form == "pt2e":
        complete_pairs(program)
    _forget_source(program)
    if path is not None:
        content = io.BytesIO()  # where a write fails, torch's own writer ends the process
        try:
            torch.export.save(program, content)
        except NotImplementedError as error:  # a type of arguments or results that torch can run, but not write
            raise ValueError(f"the program of {type(model).__name__} can't be saved: {error}") from error
        with atomic_file(path) as file:
            file.write(content.getbuffer())
    return program


def _forget_source(program: ExportedProgram) -> None:
    """Delete what torch.export notes besides the program: example inputs, and stack traces with source code."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _program_form(converted: nn.Module) -> nn.Module:
    """Return a copy of ``converted`` whose layers compute with PyTorch's operators, whatever backend runs here.

    The results are the same, bit for bit.
    """
    model = copied(converted)
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.forward = partial(_quantize, module)  # type: ignore[method-assign]
        elif isinstance(module, QuantizedLayer):
            module.forward = partial(_run_layer, module)  # type: ignore[method-assign]
    return model


def _quantize(quantizer: Quantizer, x: Tensor) -> Tensor:
    return fake_quantize(x, Grid(*quantizer.calculate_qparams(), quantizer.qtype))


def _run_layer(layer: QuantizedLayer, input: Tensor, *computed: Tensor | None) -> Tensor:
    return layer.run_operators(layer.quantized_input(input), layer.integer_layer())
