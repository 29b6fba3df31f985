"""Graph modules (torchao's PT2E, torch.ao's FX graph mode): the graph stays, the code that runs it is tritonq's.

The library's passes go on rewriting its own graph, which they know: from training to eval mode, to converted models.
Whenever torch.fx generates code from that graph, a code generator of this file first makes a copy, in which calls of
tritonq replace the nodes that they compute (`graph_patterns`).
"""

from __future__ import annotations

import copy
import warnings
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from tritonq.acceleration.graph_patterns import KnownParts, Match, constants, fuse, is_in_eval, keep_constants, matches
from tritonq.acceleration.library_layers import MARK
from tritonq.acceleration.quantizers import forget_formula, has_formula, is_fake_quantizer, remember_formula
from tritonq.acceleration.report import AccelerationReport, Row
from tritonq.functional.recomputation import forget_step_memory
from tritonq.nn.fusable import ceiling_of

_KNOWN = "_tritonq_known"
_TOLD = "_tritonq_told"


class _FusedCode:
    """Base class that :func:`_generate_fused` puts before the class of a graph's code generator.

    It generates the code of a copy of the graph in which calls of tritonq replace the nodes that they compute.
    """

    _tritonq_known: KnownParts

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **options: Any) -> Any:
        plain: Any = copy.copy(self)
        plain.__class__ = type(self).__bases__[1]
        # In the library's own graph, so that what it converts and exports has them, too.
        self._tell(keep_constants(nodes.graph, self._tritonq_known))
        fused = Graph()
        fused.output(fused.graph_copy(nodes.graph, {}))
        fused.set_codegen(plain)
        fuse(fused, self._tritonq_known)
        code = fused.python_code(root_module, **options)
        # Which node each line came from: numbers of the copy's nodes, which torch.compile would look up in the graph.
        code._lineno_map = {}
        return code

    def _tell(self, changed: list[str]) -> None:
        """Warn (UserWarning) of each change once, in its words; torchao compiles a graph several times in a switch."""
        told = vars(self).setdefault(_TOLD, set())
        if news := [text for text in dict.fromkeys(changed) if text not in told]:
            told.update(news)
            warnings.warn(
                "torchao's switch of modes wrote torch's defaults over constants of the model; tritonq puts back those "
                f"that it had: {'; '.join(news)}",
                UserWarning,
                stacklevel=2,
            )


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` has a ``torch.fx.GraphModule`` that calls fake quantizers of torch.ao or torchao."""
    return any(_quantizers(module) for module in _graph_modules(model))


def package(model: nn.Module) -> str:
    """Return ``"torchao"`` or ``"torch"``, the Python package that prepared ``model``.

    ``"torchao"`` if torchao defines the class of any module in ``model``. :func:`tritonq.accelerate` compares the
    package's installed version with those that it knows. Call it if :func:`is_prepared` is true; that is not checked.
    """
    return "torchao" if any(type(m).__module__.startswith("torchao.") for m in model.modules()) else "torch"


def accelerate(model: nn.Module) -> AccelerationReport:
    """Let the code of every graph in ``model`` that calls fake quantizers run tritonq's operators; return the report.

    ``model`` is changed in place: its graph modules generate other code from their unchanged graphs, and known fake
    quantizers get a formula. The report has one row for each group of nodes that one call replaces, and one for each
    fake quantizer that stays the library's.
    """
    report = AccelerationReport(_library(model))
    for prefix, module in model.named_modules():
        if not isinstance(module, GraphModule) or not (quantizers := _quantizers(module)):
            continue
        reasons = {target: _formula_reason(held) for target, held in quantizers.items()}
        known = KnownParts(
            frozenset(target for target, reason in reasons.items() if reason is None),
            frozenset(name for name, held in module.named_modules() if MARK in vars(held) and hasattr(held, "weight")),
            tuple((name, c) for name, held in module.named_modules() if (c := ceiling_of(held)) is not None),
            constants(module.graph),
            frozenset(name for name, held in module.named_modules() if getattr(held, "inplace", False)),
        )
        found = matches(module.graph, known)
        start = f"{prefix}." if prefix else ""
        report.rows += [_row(start, match.nodes[-1].name, match.kind, match.quantizers) for match in found]
        report.rows += [
            Row(start + target, type(quantizers[target]).__name__, reason=reason)
            for target, reason in reasons.items()
            if reason is not None
        ]
        report.faults += _faults(module, found, quantizers)
        _generate_fused(module, known)
    return report


def _faults(module: GraphModule, found: list[Match], quantizers: dict[str, nn.Module]) -> list[str]:
    """Return warnings, one sentence each, about changes that torchao makes to models and may have made to this one.

    It gives BatchNorms behind convolutions eps 1e-5 and momentum 0.1, and lets observers go on in eval mode.

    Args:
        module: the graph module.
        found: what tritonq computes of it.
        quantizers: its fake quantizers, by target; without one of torchao the list is empty.
    """
    if not any(type(held).__module__.startswith("torchao.") for held in quantizers.values()):
        return []
    faults = []
    norms = sum("BatchNorm" in match.kind for match in found)
    if norms:
        faults.append(
            f"torchao's prepare_qat_pt2e gave {norms} BatchNorms behind convolutions eps 1e-05 and momentum 0.1, "
            "whatever the model had; the graph does not say what that was, and tritonq computes with what it says"
        )
    observing = sum(bool(held.observer_enabled) for held in quantizers.values() if hasattr(held, "observer_enabled"))
    if observing and is_in_eval(module.graph):
        faults.append(
            f"{observing} observers go on in eval mode, as torchao's do: each batch that is evaluated moves a range; "
            "model.apply(torchao.quantization.pt2e.disable_observer) stops them"
        )
    return faults


def keep_modes(original: nn.Module, copied: nn.Module) -> None:
    """Give a copied model's graph modules the methods ``train`` and ``eval`` that torchao put on the original's.

    Copying loses them, and torchao's note of the mode (``_exported_training``), which is copied, too.

    Args:
        original: the model that was copied.
        copied: its deep copy, changed in place.
    """
    for old, new in zip(_graph_modules(original), _graph_modules(copied), strict=True):
        for name, value in vars(old).items():
            if name in ("train", "eval") and isinstance(value, MethodType):
                new.__dict__[name] = MethodType(value.__func__, new)
            elif name == "_exported_training":
                new.__dict__[name] = value


def restore(model: nn.Module) -> None:
    """Give every accelerated graph of ``model`` the library's code generator back, in place.

    It also deletes what tritonq stored on modules: the formula of each quantizer of torchao (`eager` deletes those of
    torch.ao), and on any module what a training step needs when activation checkpointing runs it again.
    """
    for module in _graph_modules(model):
        codegen: Any = module.graph._codegen
        if isinstance(codegen, _FusedCode):
            codegen.__class__ = type(codegen).__bases__[1]
            for name in (_KNOWN, _TOLD):
                vars(codegen).pop(name, None)
            module.recompile()
    for held in model.modules():
        if type(held).__module__.startswith("torchao."):
            forget_formula(held)
        forget_step_memory(held)


def is_accelerated(model: nn.Module) -> bool:
    """Whether tritonq generates the code of at least one graph in ``model``."""
    return any(isinstance(module.graph._codegen, _FusedCode) for module in _graph_modules(model))


def _generate_fused(module: GraphModule, known: KnownParts) -> None:
    """Let :class:`_FusedCode` generate the code of ``module`` from now on, in place."""
    codegen: Any = module.graph._codegen
    kind = type(codegen)
    codegen.__class__ = type(f"Fused{kind.__name__}", (_FusedCode, kind), {"__module__": __name__})
    codegen._tritonq_known = known
    module.recompile()


def _graph_modules(model: nn.Module) -> list[GraphModule]:
    return [module for module in model.modules() if isinstance(module, GraphModule)]


def _quantizers(module: GraphModule) -> dict[str, nn.Module]:
    """Return the fake quantizers that the graph of ``module`` calls, by target (their path in ``module``)."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    held = {target: module.get_submodule(target) for target in sorted(called)}
    return {target: each for target, each in held.items() if is_fake_quantizer(each)}


def _formula_reason(quantizer: nn.Module) -> str | None:
    return None if has_formula(quantizer) else remember_formula(quantizer)


def _row(start: str, name: str, kind: str, quantizers: list[str]) -> Row:
    return Row(start + name, kind, "operator with " + ", ".join(quantizers))


def _library(model: nn.Module) -> str:
    if package(model) == "torchao":
        import torchao

        return f"torchao {torchao.__version__}"
    return f"torch.ao, FX graph mode (torch {torch.__version__})"
