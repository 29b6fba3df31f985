"""torch.ao's functions that take a model from float to integers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tritonq import qconfig_mapping
from tritonq.calibration import calibrating
from tritonq.deploy import convert as convert_model
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.recurrent_forward import WEIGHT_QUANTIZER, is_weight_quantizer
from tritonq.prepare import prepare_qat
from tritonq.prepare.edit.fuse import fuse_row, fuse_rows, move_hooks
from tritonq.prepare.record.snapshot import copied
from tritonq.torch_ao.mapping import QConfigMapping

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def convert(
    module: nn.Module,
    mapping: None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: None = None,
    use_precomputed_fake_quant: bool = False,
) -> nn.Module:
    """Return the deployed form of a prepared model, as :func:`tritonq.convert` makes it: integer weights, fixed grids.

    A model that has seen no data is converted too, with grids of no meaning, so that a state dict can be loaded into
    the result. A weight's zero points are left out where all are 0: if the state dict has them and the result has not,
    or the other way round, loading it fails.

    Args:
        module: a trained model.
        mapping: must be None, since layers know their deployed form.
        inplace: change ``module`` itself instead of a copy.
        remove_qconfig: has no effect: converted layers keep the target's name alone.
        is_reference: must be False; ``export_program(form="pt2e")`` writes the form with quantize and dequantize.
        convert_custom_config_dict: must be None.
        use_precomputed_fake_quant: has no effect: converted models have the scales that were trained.

    Warns:
        UserWarning: quantizers that have observed nothing.

    Raises:
        ValueError: an option that must be None or False and is not, or what :func:`tritonq.convert` raises.

    Source: torch.ao.quantization.convert.

    Examples:
        >>> import torch, tritonq
        >>> qat = tritonq.prepare_qat(nn.Sequential(nn.Linear(3, 2)), example_inputs=torch.ones(1, 3)).train()
        >>> _ = qat(torch.randn(8, 3))
        >>> type(convert(qat.eval())[0]).__name__
        'QuantizedLinear'
    """
    _check_unset(mapping=mapping, is_reference=is_reference, convert_custom_config_dict=convert_custom_config_dict)
    unseen = _without_ranges(module)
    if not unseen:
        return convert_model(module, inplace)
    warnings.warn(
        f"{len(unseen)} quantizers, {unseen[0]!r} first, have observed nothing, and their grids have no meaning: load "
        "a state dict into the converted model",
        stacklevel=2,
    )
    module = module if inplace else copied(module)
    for name in unseen:
        _give_range(module, name)
    return convert_model(module, inplace=True)


def _without_ranges(model: nn.Module) -> list[str]:
    quantizers = {name: part for name, part in model.named_modules() if isinstance(part, FakeQuantizeBase)}
    return [name for name, quantizer in quantizers.items() if not quantizer.has_qparams()]


def _give_range(model: nn.Module, name: str) -> None:
    """Let the quantizer at path ``name`` observe its layer's weight; if it is no weight's, the numbers from 0 to 1."""
    quantizer = cast(FakeQuantizeBase, model.get_submodule(name))
    owner, _, attribute = name.rpartition(".")
    values = torch.tensor([0.0, 1.0])
    if is_weight_quantizer(name):
        values = getattr(model.get_submodule(owner), attribute.removesuffix(WEIGHT_QUANTIZER))
    switch, mode = quantizer.observer_enabled.clone(), quantizer.training
    with torch.no_grad():
        quantizer.enable_observer()
        quantizer.train()(values.to(quantizer.observer_enabled.device))
        quantizer.observer_enabled.copy_(switch)
    quantizer.train(mode)


def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: qconfig_mapping.QConfigMapping | Mapping[str, Any],
    example_inputs: Any,
    prepare_custom_config: None = None,
    backend_config: None = None,
) -> nn.Module:
    """Return a copy of a model with fake quantization, as :func:`tritonq.prepare_qat` makes it with example inputs.

    The model is run on them, and not traced symbolically as in torch.ao.

    Args:
        model: a float model; it stays as it is.
        qconfig_mapping: the mapping, or a dict as :meth:`tritonq.torch_ao.QConfigMapping.from_dict` takes.
        example_inputs: a tensor, or a tuple of arguments.
        prepare_custom_config: must be None; whatever Python the forward holds can stay.
        backend_config: must be None; the qconfig's target says what its engine computes.

    Raises:
        ValueError: an option that must be None and is not, or what :func:`tritonq.prepare_qat` raises.
        TypeError: a model, mapping, qconfig or example inputs of the wrong type.
        RuntimeError: with rounding off the prepared model would not compute what the float model does.

    Source: torch.ao.quantization.quantize_fx.prepare_qat_fx.

    Examples:
        >>> import torch
        >>> from tritonq.torch_ao import get_default_qat_qconfig_mapping
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
        >>> prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (torch.randn(2, 3, 8, 8),))
        >>> type(prepared[0]).__name__
        'ConvBnReLU2d'
    """
    _check_unset(prepare_custom_config=prepare_custom_config, backend_config=backend_config)
    chosen = QConfigMapping.from_dict(qconfig_mapping) if isinstance(qconfig_mapping, Mapping) else qconfig_mapping
    return prepare_qat(model, qconfig=chosen, example_inputs=example_inputs)


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: None = None,
    backend_config: None = None,
    keep_original_weights: bool = False,
) -> nn.Module:
    """Return the deployed form of a prepared model, as :func:`tritonq.convert` makes it: integer weights, fixed grids.

    Args:
        graph_module: what :func:`prepare_qat_fx` returned, trained; it stays as it is.
        convert_custom_config: must be None.
        _remove_qconfig: has no effect.
        qconfig_mapping: must be None; the prepared model has its qconfigs.
        backend_config: must be None.
        keep_original_weights: must be False; the prepared model has them.

    Raises:
        ValueError: an option that must be None or False and is not, or what :func:`tritonq.convert` raises.

    Source: torch.ao.quantization.quantize_fx.convert_fx.

    Examples:
        >>> import torch
        >>> from tritonq.torch_ao import get_default_qat_qconfig_mapping
        >>> x = torch.randn(8, 3)
        >>> qat = prepare_qat_fx(nn.Sequential(nn.Linear(3, 2)).train(), get_default_qat_qconfig_mapping(), (x,))
        >>> _ = qat(x)
        >>> type(convert_fx(qat.eval())[0]).__name__
        'QuantizedLinear'
    """
    _check_unset(convert_custom_config=convert_custom_config, qconfig_mapping=qconfig_mapping)
    _check_unset(backend_config=backend_config, keep_original_weights=keep_original_weights)
    return convert_model(graph_module)


def quantize_qat(model: nn.Module, run_fn: Callable[..., Any], run_args: Sequence[Any], inplace: bool = False) -> Any:
    """Prepare a model as eager ``prepare_qat`` does, train it by ``run_fn(model, *run_args)``, and convert it.

    Args:
        model: a float model with stubs and qconfigs.
        run_fn: trains the prepared model, its first argument, which is in training mode; what it returns is not used.
        run_args: its other arguments.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The converted model.

    Raises:
        ValueError: what ``prepare_qat`` and :func:`tritonq.convert` raise, such as for a ``run_fn`` that runs no data.
        TypeError: a qconfig of the wrong type.

    Source: torch.ao.quantization.quantize_qat.

    Examples:
        >>> import torch, tritonq
        >>> model = tritonq.torch_ao.QuantWrapper(nn.Linear(3, 2))
        >>> model.qconfig = tritonq.get_default_qat_qconfig("x86")
        >>> int8 = quantize_qat(model, lambda trained, x: trained(x), [torch.randn(8, 3)])
        >>> type(int8.module).__name__
        'QuantizedLinear'
    """
    prepared = prepare_qat((model if inplace else copied(model)).train(), inplace=True)
    run_fn(prepared, *run_args)
    return convert_model(prepared, inplace=True)


def quantize(
    model: nn.Module,
    run_fn: Callable[..., Any],
    run_args: Sequence[Any],
    mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Prepare a model with stubs, calibrate it by ``run_fn(model, *run_args)``, and convert it: no training.

    Args:
        model: a float model with stubs and qconfigs.
        run_fn: runs the prepared model, its first argument, on data, in eval mode; what it returns is not used.
        run_args: its other arguments.
        mapping: float type to quantization-aware type; None: ``tritonq.nn.DEFAULT_QAT_MAPPING``.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The converted model.

    Raises:
        ValueError: what ``prepare_qat``, :func:`tritonq.calibrate` and :func:`tritonq.convert` raise.
        TypeError: a qconfig of the wrong type.

    Source: torch.ao.quantization.quantize.

    Examples:
        >>> import torch, tritonq
        >>> model = tritonq.torch_ao.QuantWrapper(nn.Linear(3, 2))
        >>> model.qconfig = tritonq.torch_ao.get_default_qconfig("x86")
        >>> int8 = quantize(model, lambda observed, x: observed(x), [torch.randn(8, 3)])
        >>> type(int8.module).__name__
        'QuantizedLinear'
    """
    prepared = prepare_qat((model if inplace else copied(model)).train(), mapping, inplace=True).eval()
    with calibrating(prepared):
        run_fn(prepared, *run_args)
    return convert_model(prepared, inplace=True)


def fold_known_modules(
    mod_list: Sequence[nn.Module],
    is_qat: bool,
    additional_fuser_method_mapping: Mapping[Any, Callable[..., nn.Module]] | None = None,
) -> list[nn.Module]:
    """Fuse a row of modules in eval mode, and return as many modules.

    The first one is the folded or fused module, the others are ``nn.Identity``. The first module's forward pre-hooks
    and the last one's forward and backward hooks are moved to the fused module.

    Args:
        mod_list: such as ``[conv, bn, relu]``.
        is_qat: not used; torch.ao has it.
        additional_fuser_method_mapping: for tuples of types, the function that fuses such a row; it is called with
            False (not for training) and the modules. None: there are none.

    Raises:
        ValueError: a module in training mode, or a row that has no fused form.
    """
    if any(module.training for module in mod_list):
        raise ValueError("fuse_modules folds BatchNorms, in eval mode: call model.eval(), or fuse_modules_qat")
    custom = (additional_fuser_method_mapping or {}).get(tuple(type(module) for module in mod_list))
    fused: nn.Module
    if custom is not None:
        fused = custom(False, *mod_list)
    else:
        fused = fuse_row(mod_list)  # raises for a row that has no fused form
        first, second, *rest = mod_list
        if isinstance(second, _BatchNorm):
            folded = _fold(first, second)
            fused = fuse_row([folded, *rest]) if rest else folded
    move_hooks(mod_list[0], mod_list[-1], fused)
    return [fused, *(nn.Identity().eval() for _ in mod_list[1:])]


def _fold(layer: Any, batch_norm: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, batch_norm)
    folded: nn.Module = fuse_conv_bn_eval(layer, batch_norm, isinstance(layer, _TRANSPOSED))
    return folded


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: Callable[..., Sequence[nn.Module]] = fold_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Fuse named rows of modules in eval mode: BatchNorms are folded into the layer before them.

    Args:
        model: the model that holds the modules, in eval mode.
        modules_to_fuse: one row of paths, such as ``["stem.conv", "stem.bn"]``, or a list of rows.
        inplace: change ``model`` itself instead of a copy.
        fuser_func: called as ``fuser_func(modules, False, mapping)`` with the modules of one row and the mapping of
            fuser methods, ``{}`` if there are none; returns as many modules that replace them.
        fuse_custom_config_dict: ``{"additional_fuser_method_mapping": {types: fuser method}}``, with the tuple of types
            of a row and the function that fuses it: ``method(False, *modules)`` returns the one fused module. None: no
            further rows.

    Returns:
        The model; the first module of each row is the folded layer, or with a ReLU the fused one of both, and the
        others are ``nn.Identity``.

    Raises:
        ValueError: a module in training mode (use :func:`tritonq.fuse_modules_qat`), a row that has no fused form, or a
            path without a module.

    Source: torch.ao.quantization.fuse_modules.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> [type(module).__name__ for module in fuse_modules(model, [["0", "1", "2"]])]
        ['ConvReLU2d', 'Identity', 'Identity']
    """
    return fuse_rows(model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, is_qat=False)


def _check_unset(**options: Any) -> None:
    """Raise ValueError if one of these options of torch.ao has a value: they have no counterpart here."""
    given = [f"{name}={value!r}" for name, value in options.items() if value]
    if given:
        raise ValueError(f"no counterpart of {', '.join(given)}: see docs/coming-from-torch-ao.md, What differs")
