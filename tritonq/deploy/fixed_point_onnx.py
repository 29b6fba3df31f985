"""Fixed-point networks as ONNX: integer convolutions and products, requantized by powers of two."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from tritonq.deploy.files import atomic_file
from tritonq.deploy.fixed_point import convert_fixed_point, has_fixed_point
from tritonq.deploy.fixed_point_modules import (
    FixedPointFormat,
    IntegerAdd,
    IntegerAvgPool2d,
    IntegerLayer,
    IntegerModule,
)
from tritonq.deploy.onnx_files import CODES_KEY, TARGET_KEY, add_metadata, require_onnx
from tritonq.nn.fixed_point_joins import FixedPointMaxPool2d
from tritonq.reference.int8_conv import ACCUMULATOR_MAX

_OPSET = 18
# Both factors as unsigned bytes around this zero point: ONNX Runtime's kernels for signed weights add pairs of products
# in 16 bits on x86 without VNNI, and saturate.
_MIDDLE = 128
_CODE_BITS = 8
# float32 holds whole numbers up to 2^24.
_EXACT_BITS = 24
_PASSED_ON = (nn.Identity, nn.Dropout, nn.Dropout2d)


def export_fixed_point_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a fixed-point network, trained or converted, as an ONNX file that ONNX Runtime runs with equal codes.

    Convolutions are ConvInteger, products MatMulInteger, both of unsigned bytes with zero points; accumulators int32.
    Requantization is ``Clip(Round(float(acc) * 2^-shift))``: the product is exact, and Round takes ties to even. It is
    computed in float64 where float32 would round an accumulator that becomes a code within the range. Axis 0 of the
    input stays open.

    Args:
        model: a network of :func:`tritonq.prepare.prepare_qat` with preset ``"f8net"``, or what ``convert`` made of it.
        path: file to write (under a temporary name, then renamed).
        example_input: the network's one input, for the sizes of the other axes.
        metadata: texts by name that the file's metadata hold besides ``"tritonq.codes"`` and ``"tritonq.target"``;
            None: none.

    Raises:
        ValueError: a module or function that has no ONNX form here (the message names it), a forward that torch.fx
            can't trace, a result other than one float tensor, accumulators that may pass 32 bits, metadata that are not
            text or have one of these two names, or what ``convert`` raises.
        RuntimeError: the network does not run on ``example_input``.
        ImportError: onnx is not installed (the extra ``tritonq[onnx]``).
        OSError: the file can't be written.

    Examples:
        >>> import tempfile, tritonq
        >>> images = torch.rand(2, 1, 8, 8)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> network = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig("f8net"), example_inputs=images)
        >>> _ = network(images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_fixed_point_onnx(network.eval(), f"{folder}/model.onnx", images)
        ...     tritonq.verify(network, f"{folder}/model.onnx", images).agrees()
        True
    """
    require_onnx("onnx")
    import onnx

    integers = convert_fixed_point(model) if has_fixed_point(model) else model
    tracer = _Tracer()
    try:
        graph = tracer.trace(integers)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} can't be traced as one graph: {error}") from error
    module = fx.GraphModule(integers, graph)
    with torch.no_grad():
        ShapeProp(module).propagate(example_input)
    writer = _Writer(module)
    content = writer.write()
    onnx.helper.set_model_props(content, {CODES_KEY: json.dumps(writer.codes), TARGET_KEY: "onnxruntime"})
    add_metadata(content, metadata)
    onnx.checker.check_model(content)
    with atomic_file(path) as file:
        file.write(content.SerializeToString())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (IntegerModule, FixedPointMaxPool2d)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return ``root_fn`` and what it is traced with: the network, and a placeholder for its one input.

        Edited forwards take ``*args``, which then hold this input alone; other parameters keep their defaults.
        """
        _, name, *_ = inspect.signature(root_fn).parameters
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]


class _Writer:
    """Translates a graph of torch.fx to ONNX, node by node.

    Methods that begin with an underscore add nodes and return the name of the result's tensor.

    Attributes:
        codes: for `verify`: one dict per layer: "quantizer" (the layer's name), "tensor" (the name of the codes that it
            reads), "zero_point" (0) and "axis" (None).
    """

    def __init__(self, module: fx.GraphModule) -> None:
        import onnx

        self.codes: list[dict[str, Any]] = []
        self._onnx = onnx
        self._module = module
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._names: dict[fx.Node, str] = {}

    def write(self) -> Any:
        helper, types = self._onnx.helper, self._onnx.TensorProto
        inputs, outputs = [], []
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._names[node] = node.name
                inputs.append(helper.make_tensor_value_info(node.name, types.FLOAT, ["batch", *_shape(node)[1:]]))
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or _dtype(result) != torch.float32:
                    raise ValueError("a fixed-point network returns one tensor of real values to be exported")
                self._emit("Identity", [self._names[result]], name="output")
                outputs.append(helper.make_tensor_value_info("output", types.FLOAT, ["batch", *_shape(result)[1:]]))
            else:
                self._names[node] = self._translate(node)
        graph = helper.make_graph(self._nodes, "fixed_point", inputs, outputs, self._constants)
        opsets = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="tritonq")

    def _translate(self, node: fx.Node) -> str:
        sources = [self._names[item] for item in node.all_input_nodes]
        if node.op == "call_module":
            module = self._module.get_submodule(str(node.target))
            if isinstance(module, IntegerLayer):
                return self._layer(module, sources[0])
            if isinstance(module, IntegerAdd):
                return self._add(module, sources)
            if isinstance(module, IntegerAvgPool2d):
                return self._average(module, sources[0], _shape(node.all_input_nodes[0])[1])
            if isinstance(module, nn.MaxPool2d):
                return self._max_pool(module, sources[0], node)
            if isinstance(module, _PASSED_ON):
                return sources[0]
            kind = type(module).__name__.lower()
        else:
            kind = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
        kind = kind.rstrip("_")
        if kind == "relu":
            return self._relu(sources[0], _dtype(node))
        if kind in ("flatten", "reshape", "view", "squeeze", "unsqueeze"):
            shape = self._constant(torch.tensor([-1, *_shape(node)[1:]], dtype=torch.int64))
            return self._emit("Reshape", [sources[0], shape])
        if kind == "cat":
            parts = cast(Sequence[fx.Node], node.args[0] if node.args else node.kwargs["tensors"])
            return self._emit("Concat", [self._names[part] for part in parts], axis=_argument(node, "dim", 0))
        if kind in ("log_softmax", "softmax", "logsoftmax") and _dtype(node) == torch.float32:
            of_module = self._module.get_submodule(str(node.target)).dim if node.op == "call_module" else None
            axis = _argument(node, "dim", of_module)
            if axis is None:  # torch's own choice
                axis = 0 if len(_shape(node)) in (1, 3) else 1
            return self._emit("Softmax" if kind == "softmax" else "LogSoftmax", sources, axis=axis)
        if kind == "dropout":
            return sources[0]
        raise ValueError(f"{node.name} ({kind}) has no ONNX form in a fixed-point network")

    def _layer(self, layer: IntegerLayer, source: str) -> str:
        if layer.bound > ACCUMULATOR_MAX:
            raise ValueError(f"accumulators of {layer.name!r} may pass 32 bits, where ONNX Runtime would wrap around")
        if layer.encodes:
            source = self._encode(source, layer.input)
        self.codes.append({"quantizer": layer.name, "tensor": source, "zero_point": 0, "axis": None})
        codes, zero = self._unsigned(source, layer.input)
        weight = (layer.weight.to(torch.int32) + _MIDDLE).to(torch.uint8)
        middle = self._constant(torch.tensor(_MIDDLE, dtype=torch.uint8))
        if layer.linear:
            matrix = self._constant(weight[:, :, 0, 0].t().contiguous())
            total = self._emit("MatMulInteger", [codes, matrix, zero, middle])
            shape: tuple[int, ...] = (-1,)
        else:
            geometry = layer.geometry
            total = self._emit(
                "ConvInteger",
                [codes, self._constant(weight), zero, middle],
                strides=list(geometry["stride"]),
                pads=[*geometry["padding"], *geometry["padding"]],
                dilations=list(geometry["dilation"]),
                group=geometry["groups"],
            )
            shape = (1, -1, 1, 1)
        total = self._emit("Add", [total, self._constant(layer.bias.view(shape))])
        if layer.decodes:
            return self._scaled(total, layer.frac_len.view(shape))
        return self._rounded(total, layer, shape)

    def _add(self, add: IntegerAdd, sources: list[str]) -> str:
        if add.wide:
            raise ValueError(f"the sum {add.name!r} may pass 32 bits, where ONNX Runtime would wrap around")
        sources = sources if len(sources) == 2 else [sources[0]] * 2
        aligned = []
        for source, left in zip(sources, (add.left0, add.left1), strict=True):
            whole = self._emit("Cast", [source], to=self._onnx.TensorProto.INT32)
            factor = self._constant((torch.ones_like(left) << left).view(1, -1, 1, 1))
            aligned.append(self._emit("Mul", [whole, factor]))
        return self._rounded(self._emit("Add", aligned), add, (1, -1, 1, 1))

    def _average(self, pool: IntegerAvgPool2d, source: str, channels: int) -> str:
        window = pool.window
        if window.kernel_size is None:
            whole = self._emit("Cast", [source], to=self._onnx.TensorProto.INT32)
            axes = self._constant(torch.tensor([2, 3], dtype=torch.int64))
            total = self._emit("ReduceSum", [whole, axes], keepdims=int(window.keepdim))
            return self._rounded(total, pool, (-1,))
        codes, zero = self._unsigned(source, pool.input)
        total = self._emit(
            "ConvInteger",
            [codes, self._constant(torch.ones(channels, 1, *window.kernel_size, dtype=torch.uint8)), zero],
            strides=list(cast("tuple[int, int]", window.stride)),
            pads=[*window.padding, *window.padding],
            group=channels,
        )
        return self._rounded(total, pool, (-1,))

    def _max_pool(self, pool: nn.MaxPool2d, source: str, node: fx.Node) -> str:
        if _dtype(node) not in (torch.int8, torch.uint8):
            raise ValueError(f"{node.name}: ONNX pools codes, not accumulators")
        stride: Any = pool.stride
        step = pool.kernel_size if stride in ([], ()) else stride
        pairs = {"kernel_shape": pool.kernel_size, "strides": step, "dilations": pool.dilation}
        attributes: dict[str, Any] = {
            name: [value, value] if isinstance(value, int) else list(value) for name, value in pairs.items()
        }
        padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding, pool.padding)
        return self._emit("MaxPool", [source], pads=[*padding, *padding], ceil_mode=int(pool.ceil_mode), **attributes)

    def _relu(self, source: str, dtype: torch.dtype) -> str:
        if dtype == torch.uint8:
            return source
        return self._emit("Clip", [source, self._constant(torch.zeros((), dtype=dtype))])

    def _encode(self, source: str, codes: FixedPointFormat) -> str:
        steps = self._emit("Mul", [source, self._constant(torch.tensor(2.0**codes.frac_len))])
        return self._clipped(steps, codes)

    def _rounded(self, total: str, module: IntegerModule, shape: tuple[int, ...]) -> str:
        """Add the shift of accumulators to codes, ``Clip(Round(float(total) · 2^-shift))``; return the codes' name.

        If ``module`` has no output format, nothing is added and ``total`` is returned. ``shape`` is that in which its
        shifts broadcast.
        """
        if module.output is None or module.shift is None:
            return total
        # What float32 rounds is clipped if 2^24 stands for a code beyond the range of 8 bits.
        is_exact = module.bound <= 2**_EXACT_BITS or int(module.shift.max()) <= _EXACT_BITS - _CODE_BITS
        dtype = torch.float32 if is_exact else torch.float64
        return self._clipped(self._scaled(total, module.shift.view(shape), dtype), module.output, dtype)

    def _scaled(self, total: str, shift: Tensor, dtype: torch.dtype = torch.float32) -> str:
        types = self._onnx.TensorProto
        real = self._emit("Cast", [total], to=types.FLOAT if dtype == torch.float32 else types.DOUBLE)
        return self._emit("Mul", [real, self._constant(torch.exp2(-shift.double()).to(dtype))])

    def _clipped(self, steps: str, codes: FixedPointFormat, dtype: torch.dtype = torch.float32) -> str:
        """Add rounding (ties to even) and clipping of real numbers in steps; return the name of the codes."""
        ends = [self._constant(torch.tensor(float(end), dtype=dtype)) for end in (codes.quant_min, codes.quant_max)]
        whole = self._emit("Clip", [self._emit("Round", [steps]), *ends])
        types = self._onnx.TensorProto
        return self._emit("Cast", [whole], to=types.INT8 if codes.quant_min < 0 else types.UINT8)

    def _unsigned(self, source: str, codes: FixedPointFormat) -> tuple[str, str]:
        """Add the conversion of codes to unsigned bytes, by adding 128 to signed ones.

        Return the names of the bytes and of their zero point (128, or 0 for codes that are unsigned already).
        """
        if codes.quant_min >= 0:
            return source, self._constant(torch.tensor(0, dtype=torch.uint8))
        types = self._onnx.TensorProto
        whole = self._emit("Cast", [source], to=types.INT32)
        moved = self._emit("Add", [whole, self._constant(torch.tensor(_MIDDLE, dtype=torch.int32))])
        middle = self._constant(torch.tensor(_MIDDLE, dtype=torch.uint8))
        return self._emit("Cast", [moved], to=types.UINT8), middle

    def _emit(self, kind: str, inputs: list[str], name: str | None = None, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self._nodes)}" if name is None else name
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def _constant(self, values: Tensor) -> str:
        name = f"constant_{len(self._constants)}"
        array: Callable[..., Any] = self._onnx.numpy_helper.from_array
        self._constants.append(array(values.detach().cpu().numpy(), name))
        return name


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """Return the second argument of a call, by position or by ``name``; ``default`` if it is not given."""
    return node.kwargs.get(name, node.args[1] if len(node.args) > 1 else default)


def _dtype(node: fx.Node) -> torch.dtype:
    return cast(torch.dtype, node.meta["tensor_meta"].dtype)
