"""The command line: ``python -m tritonq COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

import torch

import tritonq
from tritonq.cli.messages import in_one_line
from tritonq.cli.output import printed_whole
from tritonq.near_misses import did_you_mean

# What shells expect of a process that Ctrl-C ended.
_INTERRUPTED = 130
# And of one whose output nobody reads any more, as in `tritonq predict … | head`.
_OUTPUT_CLOSED = 141
_USAGE = 2


@dataclass(frozen=True)
class Command:
    """A sub-command: its module offers ``add_arguments(parser)`` and ``main(arguments) -> int``.

    Attributes:
        module: the module's name, such as ``"tritonq.cli.train"``. It is imported when the command is chosen, so that
            others work without the packages that it needs.
        summary: one line for the list of commands.
        extra: the extra of tritonq that installs these packages: ``"demo"`` for ``pip install 'tritonq[demo]'``.
    """

    module: str
    summary: str
    extra: str


# What the extras of pyproject.toml install, by the names of imports.
_PACKAGES = frozenset({"PIL", "jinja2", "matplotlib", "onnx", "onnxruntime", "onnxscript", "sklearn", "tqdm"})
COMMANDS = {
    "demo": Command(
        "tritonq.demo.run", "train a CNN, fine-tune it with QAT, deploy it, and compare all of them", "demo"
    ),
    "train": Command(
        "tritonq.cli.train", "quantization-aware training of your own model on a folder of images, with resume", "demo"
    ),
    "predict": Command("tritonq.cli.predict", "the classes of image files, by any model that train wrote", "demo"),
    "evaluate": Command("tritonq.cli.evaluate", "how often a model is right on a folder of images", "demo"),
    "export": Command("tritonq.cli.export", "write ONNX, int8 and .pt2 files from a checkpoint", "demo"),
    "report": Command(
        "tritonq.report.run", "one page that shows what quantization costs, layer by layer, worst first", "demo"
    ),
    "doctor": Command("tritonq.cli.doctor", "versions, GPUs, the backend that runs and why, tuned tables", "report"),
    "completion": Command("tritonq.cli.completion", "print a script for a shell's completion", "demo"),
    "bench": Command(
        "tritonq.perf.runner", "time operators and training steps against other implementations", "report"
    ),
    "tune": Command("tritonq.perf.tuner", "search launch parameters of the kernels for this GPU", "report"),
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option in its help, unless it is None, False or an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without argparse's list of options."""

    def error(self, message: str) -> NoReturn:
        """Print one line, the message and where to find help, to stderr; leave with exit status 2 (SystemExit).

        The line is ``tritonq train: MESSAGE; see tritonq train --help`` for the parser of ``train``.
        """
        joint = " See" if message.endswith("?") else "; see"
        self.exit(_USAGE, f"{self.prog}: {message}{joint} {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Return the namespace with the parsed arguments, and ``[]``; arguments are those of argparse's method.

        An unknown option, or a word too many, ends the program by :meth:`error`, in the name of the command that got
        it, with the known options that the first unknown one may have been meant for.
        """
        chosen, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            mistyped = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            near = did_you_mean(mistyped, known) if mistyped else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return chosen, unknown


def build_parser(words: Sequence[str] = (), every_command: bool = False) -> argparse.ArgumentParser:
    """Return the parser of ``python -m tritonq``, which has a sub-command for each entry of ``COMMANDS``.

    Args:
        words: what the command line holds behind ``tritonq``, such as ``["doctor", "--help"]``. The command that they
            begin with gets its options; for others only their names and summaries are known.
        every_command: give all commands their options; those whose packages are missing go without.

    Raises:
        SystemExit: the module of the command in ``words`` needs a package that is not installed; the message has the
            ``pip install`` that helps.
    """
    parser = _Parser(prog="tritonq", description="Quantization-aware training for PyTorch.")
    parser.add_argument("--version", action="version", version=f"tritonq {tritonq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.summary, description=command.summary, formatter_class=_HelpFormatter
        )
        if list(words[:1]) == [name]:
            _import(name, command).add_arguments(subparser)
        elif every_command:
            with suppress(SystemExit):
                _import(name, command).add_arguments(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in ``arguments``, such as ``["doctor"]``, and return its exit status.

    None: the arguments of the process. 0 is success; 1 what a command itself reports as a failure (``doctor``:
    problems, ``predict``: unreadable images, ``demo``: models that disagree) or a ValueError, TypeError, OSError,
    RuntimeError or MemoryError, told in one line on stderr, as is a package that the command misses only as it runs; 2
    that ``bench`` or ``tune`` has nothing to run or no GPU; 130 Ctrl-C, or 128 plus the number of another signal after
    which a run stopped (143: SIGTERM); 141 that the program that reads the output ended (nothing is told then).
    Warnings are printed in one line, too.

    Raises:
        SystemExit: a usage error (status 2), ``--help`` or ``--version`` (0), or a package that is missing when the
            command's module is imported (1).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words[:1] and words[0] in COMMANDS else ""
    program = f"tritonq {name}".rstrip()
    with warnings.catch_warnings():
        warnings.showwarning = _warn_in_one_line
        try:
            with printed_whole():
                return _run(words)
        except KeyboardInterrupt as error:
            print(f"{program}: {str(error) or 'interrupted'}", file=sys.stderr)
            return int(getattr(error, "status", _INTERRUPTED))
        except BrokenPipeError:
            return _OUTPUT_CLOSED
        except ModuleNotFoundError as error:  # of a package that a command imports when it needs it
            print(_what_is_missing(name, error), file=sys.stderr)
            return 1
        except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
            print(f"{program}: {_in_one_line(error)}", file=sys.stderr)
            return 1


def _run(words: Sequence[str]) -> int:
    parser = build_parser(words)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        parser.error(f"unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS)} (commands: {known})")
    chosen = parser.parse_args(words)
    return int(_import(chosen.command, COMMANDS[chosen.command]).main(chosen))


def _warn_in_one_line(message: Warning | str, *where: object, **further: object) -> None:
    """Print a warning in one line to stderr, without the source line that raised it, which says nothing to a user."""
    print(f"tritonq: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _in_one_line(error: Exception) -> str:
    """Return the text of an error in one line; if memory was short, smaller batches and images are recommended."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        first_line = next(iter(str(error).splitlines()), "")
        return f"too little memory; smaller batches and images need less: {first_line}".removesuffix(": ")
    return in_one_line(error)


def _import(name: str, command: Command) -> ModuleType:
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        raise SystemExit(_what_is_missing(name, error)) from error


def _what_is_missing(name: str, error: ModuleNotFoundError) -> str:
    """Return the line that names a missing package, with the ``pip install`` that helps if it is one of the extras'.

    An error of tritonq's own modules is raised.

    Args:
        name: of the command.
        error: what importing the package raised.
    """
    if name not in COMMANDS or error.name is None or error.name.startswith("tritonq"):
        raise error
    is_ours = error.name.partition(".")[0] in _PACKAGES
    return f"tritonq {name} needs {error.name}" + (
        f": pip install 'tritonq[{COMMANDS[name].extra}]'" if is_ours else ", which is not installed"
    )


if __name__ == "__main__":
    sys.exit(main())
