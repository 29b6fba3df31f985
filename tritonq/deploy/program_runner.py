"""Running a program of :func:`tritonq.export_program`, with its codes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tritonq.deploy.codes import Codes, GivenCodes, Runner, take_given
from tritonq.deploy.modules import Quantizer
from tritonq.deploy.pt2e_form import QUANTIZER_KEY, register_pt2e_operators
from tritonq.granularity import Granularity

PROGRAM_SUFFIX = ".pt2"
# Where a node says which modules it comes from: by call their name and class, the innermost last.
_STACK = "nn_module_stack"
_QUANTIZER = f"{Quantizer.__module__}.{Quantizer.__qualname__}"
_QUANTIZES = ("quantized_decomposed.quantize_per_tensor.default", "quantized_decomposed.quantize_per_channel.default")


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """Return the program in a file of :func:`tritonq.export_program`, of form "integers" or "pt2e".

    Raises:
        ValueError: it is no file of ``torch.export.save``. A program that tritonq did not write is returned all the
            same.
        OSError: it can't be read.
    """
    register_pt2e_operators()
    try:
        with open(path, "rb") as file:
            return torch.export.load(file)
    except OSError:
        raise
    except Exception as error:  # torch.export raises what its archive, its schema and json do
        raise ValueError(f"{os.fspath(path)} is not a program of torch.export") from error


def program_runner(program: ExportedProgram) -> Runner:
    """Return a function that runs a program, operator by operator, and returns its codes and outputs.

    It is a :class:`tritonq.deploy.codes.Runner`, called with ``(args, kwargs, given)``. Codes minus zero points are
    float32 on the CPU, one tensor per call in a list by the quantizer's name; those that ``given`` has replace what the
    program computes. Tensors among the arguments are moved to the device of the program's first parameter or buffer.
    ValueError is raised for positional and named arguments nested in another way than in the example of the export.
    """
    module = program.module()
    interpreter = _CodesInterpreter(module)
    expected = program.call_spec.in_spec

    def run(
        args: tuple[Any, ...], kwargs: dict[str, Any], given: GivenCodes | None = None
    ) -> tuple[Codes, list[Tensor]]:
        flat, found = pytree.tree_flatten((args, kwargs))
        if found != expected:
            raise ValueError(f"the program takes arguments of the structure {expected}, got {found}")
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in flat]
        interpreter.codes, interpreter.given = {}, given or {}
        with torch.no_grad():
            result = interpreter.run(*moved, enable_io_processing=False)
        outputs = [value.detach().cpu() for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        return interpreter.codes, outputs

    return run


class _CodesInterpreter(fx.Interpreter):
    """Runs a graph and records codes minus zero point, by quantizer and call.

    They are what a quantizer multiplies by its scale, or in the form "pt2e" the result of a quantize operator minus its
    zero point.

    Attributes:
        codes: what the run has recorded; whoever starts a run sets it to an empty dict first.
        given: codes to use in place of the run's own; empty: none. It is set before a run, too.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.codes: Codes = {}
        self.given: GivenCodes = {}
        nodes = module.graph.nodes
        self._names = {node: name for node in nodes if (name := _rescaling_quantizer(node)) is not None}
        self._pairs = {node: name for node in nodes if (name := _pair_quantizer(node)) is not None}

    def run_node(self, n: fx.Node) -> Any:
        """Run the node ``n`` and return its result, and record the codes that it makes or multiplies by their scale.

        Codes that are given for this call then take their place, in the result or as what is multiplied.
        """
        if n in self._pairs:
            codes = super().run_node(n)
            args, _ = self.fetch_args_kwargs_from_env(n)
            zero = Granularity(args[3]).align(args[2], codes.dim()) if isinstance(args[2], Tensor) else args[2]
            other = take_given(self.given, self.codes, self._pairs[n], (codes.float() - zero).cpu())
            return codes if other is None else (other.to(codes.device) + zero).to(codes.dtype)
        if n in self._names:
            (steps, _), _ = self.fetch_args_kwargs_from_env(n)
            # Cloned, since the multiplication works in place.
            own = steps.detach().float().cpu().clone()
            other = take_given(self.given, self.codes, self._names[n], own)
            if other is not None:
                steps.copy_(other)
        return super().run_node(n)


def _pair_quantizer(node: fx.Node) -> str | None:
    """Return the name of the quantizer whose codes a quantize operator makes, in the form "pt2e".

    None for other nodes.
    """
    name = node.meta.get("custom", {}).get(QUANTIZER_KEY)
    return name if str(node.target) in _QUANTIZES else None


def _rescaling_quantizer(node: fx.Node) -> str | None:
    """Return the name of the quantizer whose codes a node multiplies by their scale; None for other nodes."""
    if node.target is not torch.ops.aten.mul_.Tensor or not node.meta.get(_STACK):
        return None
    path, kind = list(node.meta[_STACK].values())[-1]
    if kind != _QUANTIZER:
        return None
    scale = node.args[1]
    while isinstance(scale, fx.Node) and scale.target in (torch.ops.aten.to.dtype, torch.ops.aten.view.default):
        scale = scale.args[0]
    if not isinstance(scale, fx.Node) or scale.op != "get_attr":
        return None
    # The stack's path is cut short where layers share a quantizer; the buffer's is then one of several names.
    owner = str(scale.target).rpartition(".")[0]
    return owner if owner.endswith(f".{path}") else str(path)
