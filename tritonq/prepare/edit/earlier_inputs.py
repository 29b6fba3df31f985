"""Load files of version 0.1.0, in which hooks quantized what modules read and return.

The quantizers of a model's inputs were children of the model then, in ``input_fake_quants``; today they are children of
the layers that read the inputs. Pickled models name the classes and functions in this file, state dicts name the
quantizers after the model's parameters, and converted files name the hooks of each module.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tritonq.prepare.forwards.edited import apply_forward, forward_data, quantizing_data
from tritonq.prepare.forwards.graph import ForwardData
from tritonq.prepare.forwards.quantized import Read
from tritonq.prepare.record.structure import Path

INPUTS = "input_fake_quants"
_NAMES = "tritonq_earlier_names"


@dataclass(frozen=True)
class InputPlace:
    """An input of a model: which argument, and where in it the tensor is.

    Attributes:
        key: name of its quantizer in ``input_fake_quants``.
        position: index among the positional arguments; None if it is passed by name only.
        name: name of the forward's parameter; None if it is passed by position only.
        path: dict keys and list indices that lead from the argument to the tensor, such as ``("images", 0)``; empty if
            the argument is the tensor.
    """

    key: str
    position: int | None
    name: str | None
    path: Path

    @property
    def read(self) -> Read:
        """The argument that an edited forward rounds first, with its quantizer ``input_fake_quants.<key>``."""
        return Read(f"{INPUTS}.{self.key}", self.position, self.name, self.path)


class InputFakeQuants(nn.ModuleDict):
    """Hold the quantizers of a model's inputs, as version 0.1.0 did, by the keys of their places.

    It has no forward of its own: the model's forward quantizes its arguments by ``places``.

    Args:
        places: where the inputs are. :attr:`InputPlace.key` is the name of each quantizer: ``"x"`` for a parameter x,
            ``"x_0"`` for the first tensor of a list x, ``"input_0"`` for a first argument without a name.
        quantizers: one for each place, in this order.

    Attributes:
        places: as the argument, a tuple.

    Raises:
        ValueError: more places than quantizers, or fewer.
    """

    def __init__(self, places: Iterable[InputPlace], quantizers: Iterable[nn.Module]) -> None:
        self.places = tuple(places)
        super().__init__({place.key: quantizer for place, quantizer in zip(self.places, quantizers, strict=True)})


def _earlier_key(forward: Any, path: Path, taken: Iterable[str]) -> str:
    """Return the key that version 0.1.0 gave to an input's quantizer.

    The key joins the parameter's name (``input_<position>`` without one) and the keys of the path by ``_``, with ``_``
    for every other sign; it ends in as many more ``_`` as keep it apart from ``taken`` and from attributes of
    ``nn.ModuleDict``.

    Args:
        forward: the model's forward, whose signature is read.
        path: a position or parameter name first, then keys that lead to the tensor inside of the argument.
        taken: keys of other quantizers.
    """
    name, *inside = path
    if isinstance(name, int):
        parameters = list(inspect.signature(forward).parameters.values())[name : name + 1]
        named = [item.name for item in parameters if item.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        name = named[0] if named else f"input_{name}"
    key = re.sub(r"\W", "_", "_".join(map(str, (name, *inside))))
    while key in set(taken) or hasattr(nn.ModuleDict, key):
        key += "_"
    return key


def note_earlier_names(model: nn.Module, names: Mapping[Path, Sequence[str]]) -> None:
    """Let a prepared model load state dicts of version 0.1.0.

    Args:
        model: the model.
        names: for each input the qualified names of the quantizers in the layers that read it, such as
            ``{("x",): ["conv1.input_fake_quant"]}``. The key is the argument's position or name, then the keys that
            lead to the tensor in it.
    """
    earlier: dict[str, str] = {}
    keys: list[str] = []
    for path, quantizers in names.items():
        keys.append(_earlier_key(model.forward, path, keys))
        earlier |= dict.fromkeys(quantizers, f"{INPUTS}.{keys[-1]}")
    if earlier:
        setattr(model, _NAMES, earlier)
        model.register_load_state_dict_pre_hook(_rename_keys)


def earlier_names(model: nn.Module) -> dict[str, str]:
    """Return the names that version 0.1.0 gave to the quantizers of a model's inputs, by their names today.

    ``{"conv1.input_fake_quant": "input_fake_quants.x"}`` for a prepared model whose layer ``conv1`` reads the argument
    ``x``; ``{}`` without such quantizers, and for a model that `prepare_qat` did not make.
    """
    return dict(getattr(model, _NAMES, {}))


def _rename_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Move the entries of input quantizers from their names in version 0.1.0 to those of today, in place.

    Torch calls this before it loads ``state_dict``; ``prefix`` is that of the model's keys.
    """
    taken: set[str] = set()
    for name, earlier in earlier_names(model).items():
        old = f"{prefix}{earlier}."
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}{name}.{key.removeprefix(old)}"] = state_dict[key]
            taken.add(key)
    for key in taken:
        del state_dict[key]


def quantize_inputs_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's arguments with its inputs quantized, as ``(args, kwargs)``: a pre-hook of version 0.1.0.

    ``module`` is the model; its child ``input_fake_quants`` has the quantizers and their places.
    """
    for place in module.input_fake_quants.places:  # type: ignore[union-attr]
        args, kwargs = place.read.quantized(module, args, kwargs)
    return args, kwargs


def quantize_first_argument_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing, as a forward pre-hook of version 0.1.0: today layers quantize their input in their forward."""


def quantize_output_hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
    """Return ``output``, rounded by the module's child ``activation_post_process``: a forward hook of version 0.1.0."""
    quantized: Tensor = module.activation_post_process(output)  # type: ignore[operator]
    return quantized


_HOOKS: dict[Any, str] = {
    quantize_inputs_hook: "quantize_inputs",
    quantize_first_argument_hook: "quantize_first_argument",
    quantize_output_hook: "quantize_output",
}


def replace_hooks(model: nn.Module) -> None:
    """Let modules of a model that version 0.1.0 pickled quantize in their forwards instead of by hooks, in place."""
    for module in list(model.modules()):
        found: list[str] = []
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(registry.items()):
                if hook in _HOOKS:
                    found.append(_HOOKS[hook])
                    del registry[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        if found:
            inputs = getattr(module, INPUTS, None)
            places = inputs.places if isinstance(inputs, InputFakeQuants) else ()
            apply_forward(module, hooked_forward(forward_data(module), found, places))


def hooked_forward(data: ForwardData | None, hooks: Collection[str], places: Iterable[InputPlace]) -> ForwardData:
    """Return new forward data, for ``apply_forward``, that make a forward do what a module did with some hooks.

    Args:
        data: data of the module's edited forward; None if the forward is its class's own.
        hooks: names of the hooks in files of version 0.1.0: "quantize_inputs" rounded arguments, "quantize_output" the
            result by the child ``activation_post_process``; "quantize_first_argument" adds nothing, since layers round
            their first argument themselves today.
        places: which arguments of this forward are rounded by the hook "quantize_inputs", and by which quantizer; empty
            for a module without that hook.

    Raises:
        ValueError: an unknown hook.
    """
    reads: list[Read] = []
    returns = None
    for hook in hooks:
        if hook == "quantize_inputs":
            reads += [place.read for place in places]
        elif hook == "quantize_output":
            returns = "activation_post_process"
        elif hook != "quantize_first_argument":  # layers do that themselves
            raise ValueError(f"unknown hook {hook!r}")
    before = data or {}
    hidden = {*before.get("hidden", ()), *({INPUTS} if "quantize_inputs" in hooks else ())}
    return {**before, **quantizing_data(reads, returns), "eval": before.get("eval"), "hidden": sorted(hidden)}
