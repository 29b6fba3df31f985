"""Single nodes of ONNX Runtime on codes of 8 bits."""

import onnxruntime
import torch
from onnx import TensorProto, helper


def run_node(kind, codes, scales, zeros):
    """Return what a node makes of two uint8 tensors; scales and zero points are those of both and of the result."""
    parameters = [(f"s{name}", f"z{name}") for name in "ABC"]
    constants = []
    for (scale_name, zero_name), scale, zero in zip(parameters, scales, zeros, strict=True):
        constants.append(helper.make_tensor(scale_name, TensorProto.FLOAT, [], [float(scale)]))
        constants.append(helper.make_tensor(zero_name, TensorProto.UINT8, [], [int(zero)]))
    operands = ["A", *parameters[0], "B", *parameters[1]]
    result, attributes = list(parameters[2]), {"axis": 0} if kind == "QLinearConcat" else {}
    inputs = [*result, *operands] if kind == "QLinearConcat" else [*operands, *result]
    domain = "" if kind == "QLinearMatMul" else "com.microsoft"
    node = helper.make_node(kind, inputs, ["C"], domain=domain, **attributes)
    shapes = [*(code.shape for code in codes), None]
    values = [
        helper.make_tensor_value_info(n, TensorProto.UINT8, shape) for n, shape in zip("ABC", shapes, strict=True)
    ]
    graph = helper.make_graph([node], "join", values[:2], values[2:], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: c.numpy() for n, c in zip("AB", codes, strict=True)})[0])
