"""Run the cases of the golden record in this process; `record_golden.py` starts it in a restricted one."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from golden import layers, models, operators
from golden.inputs import values

_DIGITS = 16

# Tensors and texts by name.
Leaves = dict[str, Any]


def run_cases(only: str | None) -> dict[str, Leaves]:
    """Return the leaves of each part, by ``case | part``."""
    parts: dict[str, Leaves] = {"probe | bits": dict(leaves(probe()))}
    for name, case in (*operators.cases(), *layers.cases(), *models.cases()):
        if only is None or only in name:
            torch.manual_seed(0)
            for part, value in layers.quietly(case).items():
                parts[f"{name} | {part}"] = dict(leaves(value))
    return parts


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of every tensor and text in nested lists and dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}.{i}")
    else:
        yield name, value


def probe() -> list[Tensor]:
    """Return results of plain PyTorch operations of the kinds whose sums depend on the machine."""
    x = values(4, 4, 5, 6, step=0.1).requires_grad_()
    weight, depthwise = values(6, 4, 3, 3, seed=1, step=0.01).requires_grad_(), values(4, 1, 3, 3, seed=2, step=0.01)
    y = F.conv2d(x, weight, padding=1)
    y.backward(values(*y.shape, seed=3, step=0.1))
    matrix = values(64, 64, step=0.1)
    results = [y, x.grad, weight.grad, F.conv2d(x, depthwise, groups=4), F.conv_transpose2d(x, weight.transpose(0, 1))]
    results += [matrix @ matrix, matrix.sum(), matrix.mean(0), matrix.var(), torch.rsqrt(matrix.abs() + 1)]
    results += [F.batch_norm(x, None, None, training=True), torch.linalg.vector_norm(matrix, dim=1)]
    results += [F.conv1d(x[:, :, 0], weight[:, :, 0]), F.conv3d(x[:, None], values(2, 1, 2, 2, 2, step=0.1))]
    return [result.detach() for result in results]


def summary_of(part: Leaves) -> list[Any]:
    """Return a hash of the bits and, for each floating-point leaf, its norm and a projection."""
    return [bits(part), *_projections(part)]


def bits(part: Leaves) -> str:
    """Return a hash of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in part.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(_plain(value).reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            digest.update(str(value).encode())
    return digest.hexdigest()[:_DIGITS]


def _plain(value: Tensor) -> Tensor:
    """``value`` with one sign of zero and one pattern of NaN: neither is specified."""
    plain = value.detach().contiguous()
    if not plain.is_floating_point():
        return plain
    plain = torch.where(plain == 0, torch.zeros_like(plain), plain)
    return torch.where(plain.isnan(), torch.full_like(plain, float("nan")), plain)


def _projections(part: Leaves) -> list[float]:
    numbers = []
    for value in part.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            flat = value.detach().double().reshape(-1).nan_to_num(1.0, 2.0, -2.0)
            signs = values(flat.numel(), seed=5, step=1, levels=2).double() * 2 + 1
            numbers += [float(f"{float(number):.5g}") for number in (flat.norm(), flat @ signs)]
    return numbers


def tensor_differences(then: dict[str, Leaves], now: dict[str, Leaves]) -> Iterator[str]:
    """Yield one line for each tensor or text that differs."""
    for part in now:
        before, after = then.get(part, {}), now[part]
        for name in (*before, *(name for name in after if name not in before)):
            if name not in before or name not in after:
                yield f"{part}{name}: {'only before' if name in before else 'only now'}"
                continue
            a, b = before[name], after[name]
            if not isinstance(a, Tensor):
                if a != b:
                    yield f"{part}{name}: {b!r} instead of {a!r}"
            elif a.shape != b.shape or a.dtype != b.dtype:
                yield f"{part}{name}: {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
            elif not torch.equal(_plain(a).reshape(-1).view(torch.uint8), _plain(b).reshape(-1).view(torch.uint8)):
                error = (a.double() - b.double()).abs()
                count = int((error != 0).sum())
                yield f"{part}{name}: {count} of {a.numel()} differ, by up to {float(error.max()):.3g}"


def main() -> None:
    """Run the command line; see `record_golden.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("summary", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parts = run_cases(args.only)
    args.summary.write_text(json.dumps({name: summary_of(part) for name, part in parts.items()}))
    if args.dump is not None:
        torch.save(parts, args.dump)
    if args.compare is not None:
        print("\n".join(tensor_differences(torch.load(args.compare), parts)))


if __name__ == "__main__":
    main()
