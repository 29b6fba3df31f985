"""The files that `train` writes at its end, with preprocessing and class names, and the accuracy of what they hold."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonq.cli.checkpoints import ModelRecipe
from tritonq.cli.classification import count_right, in_order, share_right
from tritonq.cli.data import Examples
from tritonq.cli.preprocessing import preprocessing_to_data
from tritonq.deploy import convert, export_onnx, save_converted, verify
from tritonq.deploy.onnx_session import open_session

Deployed = Literal["best", "last"]
# The key of an ONNX file's metadata that holds the same as the int8 file's.
METADATA_KEY = "tritonq.metadata"
_BYTE = 8


def deploy(model: nn.Module, made: ModelRecipe, data: Examples, output: Path, workers: int, onnx: bool = True) -> int:
    """Convert the trained model, write its files, print the accuracy before and after; return the exit status.

    The accuracy is that of the trained model, of the converted one, and of the ONNX file in ONNX Runtime.

    Args:
        model: the trained model, on the CPU; it is switched to eval mode and stays in it.
        made: how it was made, which the files hold.
        data: whose held-out images are measured.
        output: the folder for ``model.int8.pt`` and ``model.onnx``; it must exist.
        workers: processes that read images; 0: this one.
        onnx: whether to write an ONNX file; if writing it fails, a printed line says why, and the status is the same.

    Returns:
        0 if all codes of the converted model for the held-out images are those of the trained one (behind islands they
        may differ by one), else 1.

    Raises:
        ValueError: what :func:`tritonq.convert` refuses, or an image that can't be read any more.
        OSError: a file can't be written.
    """
    held_out = in_order(data.test, workers)
    trained = share_right(model, held_out)
    print(f"QAT model (eval)  {trained:.2%} of {len(data.test)} held-out images right", flush=True)
    converted = convert(model)
    path = output / "model.int8.pt"
    save_converted(converted, path, metadata=metadata(made))
    deployed = share_right(converted, held_out)
    report = verify(model, converted, held_out)
    total = report.total
    codes = _widest_codes(converted)
    print(
        f"{f'converted ({codes})':17} {deployed:.2%}; {total.differing:,} of {total.codes:,} codes differ", flush=True
    )
    written = [path]
    if onnx:
        onnx_path = output / "model.onnx"
        try:
            write_onnx(converted, made, onnx_path, target=onnx_target(converted))
            written.append(onnx_path)
            right, count = count_right(onnx_session(onnx_path)[0], held_out)
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            missing = f"{onnx_path.name} not tried" if onnx_path in written else f"no {onnx_path.name}"
            print(f"ONNX Runtime      {missing}: {reason}", flush=True)
        else:
            print(f"ONNX Runtime      {right / count:.2%}", flush=True)
    sizes = ", ".join(f"{file} ({file.stat().st_size / 1000:.1f} kB)" for file in written)
    print(f"written: {sizes}, {output / 'last.pt'}, {output / 'best.pt'}, {output / 'log.csv'}")
    return 0 if report.agrees() else 1


def _widest_codes(converted: nn.Module) -> str:
    """Return the widest codes of a converted model: ``"int8"`` for 8 bits and fewer, ``"int16"``, or ``"float"``."""
    types = [qtype for module in converted.modules() if (qtype := getattr(module, "qtype", None)) is not None]
    if any(qtype.float_format is not None for qtype in types):
        return "float"
    return "int16" if any(qtype.bits > _BYTE for qtype in types) else "int8"


def onnx_target(converted: nn.Module) -> Literal["onnxruntime", "qdq"]:
    """Return the ``target`` of ``export_onnx`` for a file that ONNX Runtime runs, whatever the preset's target is.

    It is ``"onnxruntime"``, and ``"qdq"`` for codes of 16 bits: float operators between pairs of a
    QuantizeLinear and a DequantizeLinear.
    """
    return "qdq" if _widest_codes(converted) == "int16" else "onnxruntime"


def metadata(made: ModelRecipe) -> dict[str, Any]:
    """Return what is needed to use the model, as plain data for its files.

    Keys are ``"model"``, ``"model_arguments"``, ``"preprocessing"`` and ``"classes"``, as in :class:`ModelRecipe`;
    tuples are lists, and the preprocessing is a dict.
    """
    return {
        "model": made.model,
        "model_arguments": list(made.model_arguments),
        "preprocessing": preprocessing_to_data(made.preprocessing),
        "classes": list(made.classes),
    }


def write_onnx(model: nn.Module, made: ModelRecipe, path: Path, **options: Any) -> None:
    """Write a converted model as ONNX, with :func:`metadata` as JSON in the file's property ``"tritonq.metadata"``.

    Args:
        model: the converted model.
        made: how it was made: the file's metadata tells it, and its preprocessing gives the size of the example input.
        path: the file to write.
        **options: further arguments of :func:`tritonq.export_onnx`, but not ``metadata``; such as ``target="qdq"``.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: what ``export_onnx`` refuses: a model that can't be written as ONNX, or an option.
    """
    text = {METADATA_KEY: json.dumps(metadata(made))}
    export_onnx(model, path, made.preprocessing.example(), metadata=text, **options)


def onnx_session(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """Return a function from images to logits that ONNX Runtime computes from a file, and the file's properties.

    The images are the file's first input, a tensor on the CPU, and the logits its first output. Properties are texts by
    name; ``"tritonq.metadata"`` is there in a file of :func:`write_onnx`.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: there is no such file, or ONNX Runtime can't run it.
    """
    importlib.import_module("onnxruntime")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        session = open_session(path)
    except Exception as error:  # it has a dozen types of its own, which share no base
        raise ValueError(f"{path} can't be run: {' '.join(str(error).split())}") from error
    name = session.get_inputs()[0].name

    def answer(images: Tensor) -> Tensor:
        outputs = session.run(None, {name: images.numpy()})
        return torch.from_numpy(outputs[0])

    return answer, dict(session.get_modelmeta().custom_metadata_map)
