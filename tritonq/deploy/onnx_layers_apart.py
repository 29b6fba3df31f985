"""The layers of an ONNX file one by one: each reads given codes, and the operators between codes are known by name.

The result of a *defined* operator follows from its inputs alone. Sums of floats are not defined, unless they add whole
numbers or ONNX Runtime computes them in integers: their last bits depend on the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tritonq.deploy.onnx_packed import is_packed, is_wide

# Operators whose results follow from their inputs alone: they move or choose elements, or compute each one by one
# operation that IEEE 754 rounds, or by a function that the exporter compares on all codes.
_NAMES = """
    Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Compress Concat Constant ConstantOfShape
    DepthToSpace DequantizeLinear Div Dropout Elu Equal Erf Exp Expand EyeLike FastGelu Flatten Floor Gather
    GatherElements GatherND
    Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsNaN LeakyRelu Less LessOrEqual Max MaxPool Min Mish Mod
    Mul Neg NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear QuickGelu Range Reciprocal ReduceMax ReduceMin Relu
    Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Size Slice Softplus SpaceToDepth Split Sqrt
    Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
_DEFINED = frozenset(_NAMES.split())
# Of these, the ones that compute. The last bit of a float32 is 1/256 of a 16-bit code and more, so that it decides now
# and then which of two such codes a value goes to.
_COMPUTING_NAMES = """
    Add Div Elu Erf Exp FastGelu Gelu HardSigmoid HardSwish LeakyRelu Mish Mul PRelu Pow QuantizeLinear QuickGelu
    Reciprocal Sigmoid Softplus Sqrt Sub Sum Tanh
"""
_COMPUTING = frozenset(_COMPUTING_NAMES.split())
# Functions whose last bit depends on who computes them; of codes the exporter compares all results.
_FUNCTION_NAMES = "Elu Erf Exp FastGelu Gelu HardSigmoid HardSwish Mish Pow QuickGelu Sigmoid Softplus Tanh"
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
# Sums of products: whole numbers where both operands are codes and the result becomes codes at once.
_PRODUCTS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
_INTEGER_OPERATORS = frozenset(["ConvInteger", "MatMulInteger", "BitShift"])
# Between whole numbers and a sum of them these may stand.
_KEEPING = frozenset(["Cast", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])


def given_name(tensor: str) -> str:
    """Return the name of the input that takes a tensor's place in :func:`separated`: ``"<tensor>.given"``."""
    return f"{tensor}.given"


def separated(model: Any, kinds: Mapping[str, tuple[Any, int]]) -> bytes:
    """Return a changed copy of an ONNX file, as bytes, in which each layer computes on codes that the caller gives.

    For each tensor of codes there is a new input, called ``"<tensor>.given"``, and all nodes that read the tensor read
    that input. The file's own inputs stay. Its only outputs are the tensors of codes, which it still computes.

    Args:
        model: an ``onnx.ModelProto``; not changed.
        kinds: NumPy dtype and number of dimensions of each tensor of codes, by name.
    """
    import onnx

    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    _read_inputs(graph, frozenset(kinds))
    del graph.output[:]
    for name, (dtype, dimensions) in kinds.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        shape = [None] * dimensions
        if name in types and types[name].type.tensor_type.HasField("shape"):
            found = types[name].type.tensor_type.shape.dim
            shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in found]
        graph.input.append(onnx.helper.make_tensor_value_info(given_name(name), kind, shape))
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    content: bytes = made.SerializeToString()
    return content


def _read_inputs(graph: Any, names: frozenset[str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = given_name(name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _read_inputs(attribute.g, names)


def find_islands(graph: Any, tensors: Sequence[str], target: str | None) -> dict[str, tuple[str, ...]]:
    """Return for each tensor of codes the operators before it whose last bits may differ, such as sums of floats.

    The search ends at the other tensors of codes, at inputs and at constants. Before codes of 16 bits or of floats all
    operators that compute (``_COMPUTING`` and ``_PRODUCTS``) count, too: their last bit may decide such a code. Before
    any codes functions (``_FUNCTIONS``) behind operators on integers (``_INTEGER_OPERATORS``) count, since the exporter
    compares functions of codes alone, and so do operators in none of this module's lists, such as Softmax; but not
    Resize in mode "nearest", nor sums and means that are *defined*, as this module says at its beginning.

    Args:
        graph: an ``onnx.GraphProto``.
        tensors: names of the tensors of codes.
        target: the engine that the file was written for. Products of codes count as integer sums only for
            ``"onnxruntime"``; for other engines, and for None (unknown), as float sums.

    Returns:
        By the tensor's name the types of these operators, such as ``("Softmax",)``; ``()`` if the codes are defined.
    """
    search = _Search(graph, frozenset(tensors), target == "onnxruntime")
    return {name: search.before(name) for name in tensors}


class _Search:
    def __init__(self, graph: Any, codes: frozenset[str], has_integer_products: bool) -> None:
        self._codes, self._has_integer_products = codes, has_integer_products
        self._packed = {tensor.name for tensor in graph.initializer if is_packed(tensor)}
        self._wide = {tensor.name for tensor in graph.initializer if is_wide(tensor)}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def before(self, codes: str) -> tuple[str, ...]:
        """Return the types of the operators that :func:`find_islands` counts before the codes named ``codes``, sorted.

        Those between these codes and the codes, inputs and constants before them count; ``("Softmax",)``, for example;
        ``()`` if nothing may differ. Each type is there once.
        """
        undefined = _COMPUTING | _PRODUCTS if self._is_fine(codes) else frozenset[str]()
        nodes = self._between(codes)
        return tuple(sorted({n.op_type for n in nodes if n.op_type in undefined or not self._is_defined(n)}))

    def _is_fine(self, codes: str) -> bool:
        """Whether the codes named ``codes`` have 16 bits, or are codes of floats, which a file holds as values."""
        node = self._producers.get(codes)
        return node is not None and (
            node.op_type == "DequantizeLinear" or (node.op_type == "QuantizeLinear" and node.input[2] in self._wide)
        )

    def _between(self, result: str) -> Iterator[Any]:
        """Yield the nodes on all ways to the tensor named ``result`` from other codes, inputs and constants."""
        pending, seen = [result], set()
        while pending:
            node = self._producers.get(pending.pop())
            if node is None or node.output[0] in seen:
                continue
            seen.add(node.output[0])
            yield node
            pending += [name for name in node.input if name not in self._codes]

    def _is_defined(self, node: Any) -> bool:
        kind = node.op_type
        if kind in _FUNCTIONS:
            return not any(earlier.op_type in _INTEGER_OPERATORS for earlier in self._between(node.input[0]))
        if kind in _DEFINED or kind in _INTEGER_OPERATORS:
            return True
        if kind == "Resize":
            modes = [attribute.s for attribute in node.attribute if attribute.name == "mode"]
            return modes in ([], [b"nearest"])
        if kind in ("ReduceSum", "CumSum", "MatMul") and self._is_whole(node.input[0]):
            return True
        if kind == "AveragePool":
            # The exporter multiplies the mean by its number of terms and rounds: the sum of codes.
            following = [reader.op_type for name in self._after(node, "Mul") for reader in self._readers.get(name, ())]
            return following == ["Round"]
        followed = [reader.op_type for reader in self._readers.get(node.output[0], ())] == ["QuantizeLinear"]
        if kind == "GlobalAveragePool":
            return followed and self._is_dequantized(node.input[0])
        if kind in _PRODUCTS:
            operands = all(self._is_dequantized(name) for name in node.input[:2])
            return self._has_integer_products and kind != "ConvTranspose" and operands and followed
        return False

    def _after(self, node: Any, kind: str) -> list[str]:
        """Return the names of the results of all operators ``kind`` that read the result of ``node``."""
        return [reader.output[0] for reader in self._readers.get(node.output[0], ()) if reader.op_type == kind]

    def _is_whole(self, name: str) -> bool:
        node = self._producers.get(name)
        while node is not None and node.op_type in _KEEPING:
            node = self._producers.get(node.input[0])
        return node is not None and (node.op_type == "Round" or node.op_type in _INTEGER_OPERATORS)

    def _is_dequantized(self, name: str) -> bool:
        node = self._producers.get(name)
        while node is not None and node.op_type in _KEEPING:  # a weight may be transposed
            node = self._producers.get(node.input[0])
        # ONNX Runtime has no integer products of codes of four bits.
        return node is not None and node.op_type == "DequantizeLinear" and node.input[0] not in self._packed
