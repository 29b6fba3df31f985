"""The command line: ``python -m tritonq COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Command:
    """A sub-command: its module offers ``add_arguments(parser)`` and ``main(arguments) -> int``.

    Attributes:
        module: imported when the command is chosen, so that others work without what it needs.
        summary: one line for the list of commands.
        extra: the optional dependencies that it needs.
    """

    module: str
    summary: str
    extra: str


COMMANDS = {
    "demo": Command(
        "tritonq.demo.run", "train a CNN, fine-tune it with QAT, deploy it, and compare all of them", "demo"
    ),
    "train": Command(
        "tritonq.cli.train", "quantization-aware training of your own model on a folder of images, with resume", "demo"
    ),
    "report": Command(
        "tritonq.report.run", "one page that shows what quantization costs, layer by layer, worst first", "demo"
    ),
    "doctor": Command("tritonq.cli.doctor", "versions, GPUs, the backend that runs and why, tuned tables", "report"),
    "bench": Command(
        "tritonq.perf.runner", "time operators and training steps against other implementations", "report"
    ),
    "tune": Command("tritonq.perf.tuner", "search launch parameters of the kernels for this GPU", "report"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, 2 for a usage error, 1 for a failure that is reported in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="tritonq", description="Quantization-aware training for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        if words[:1] == [name]:
            module = _import(name, command)
            module.add_arguments(subparser)
    chosen = parser.parse_args(words)
    try:
        return int(_import(chosen.command, COMMANDS[chosen.command]).main(chosen))
    except (ValueError, TypeError) as error:
        print(f"tritonq {chosen.command}: {error}", file=sys.stderr)
        return 1


def _import(name: str, command: Command) -> ModuleType:
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("tritonq"):
            raise
        message = f"tritonq {name} needs {error.name}: pip install 'tritonq[{command.extra}]'"
        raise SystemExit(message) from error


if __name__ == "__main__":
    sys.exit(main())
