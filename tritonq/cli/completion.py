"""The command ``completion``: print a script with which a shell completes commands, options and their choices."""

from __future__ import annotations

import argparse

from tritonq.__main__ import build_parser

SHELLS = ("bash", "zsh")
_TEMPLATE = """\
# tritonq: completion for bash and zsh
{zsh}_tritonq() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    case "${{COMP_WORDS[1]}} $before" in
{choices}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [ "${{word#-}}" != "$word" ]; then
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    else
        local IFS=$'\\n'
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _tritonq tritonq
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of ``python -m tritonq completion``: which shell, "bash" or "zsh"."""
    parser.epilog = "For bash: tritonq completion bash >> ~/.bashrc. For zsh: tritonq completion zsh >> ~/.zshrc."
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def main(arguments: argparse.Namespace) -> int:
    """Print the completion script for the shell that is the command's argument; return the exit status 0."""
    print(script(arguments.shell), end="")
    return 0


def script(shell: str) -> str:
    """Return the completion script for ``shell`` ("bash" or "zsh"), lines for ``~/.bashrc`` or ``~/.zshrc``.

    Of commands that need packages which are not installed only the name is completed.
    """
    commands = _commands()
    choices, options = [], []
    for name, actions in commands.items():
        flags = sorted(flag for action in actions for flag in action.option_strings if flag.startswith("--"))
        options.append(f'            {name}) COMPREPLY=($(compgen -W "{" ".join(flags)}" -- "$word"));;')
        for action in actions:
            if action.choices is not None:
                words = " ".join(str(choice) for choice in action.choices)
                patterns = "|".join(f'"{name} {flag}"' for flag in action.option_strings) or f'"{name} {name}"'
                choices.append(f'        {patterns}) COMPREPLY=($(compgen -W "{words}" -- "$word")); return;;')
    return _TEMPLATE.format(
        zsh=_ZSH if shell == "zsh" else "",
        commands=" ".join(commands),
        choices="\n".join(choices),
        options="\n".join(options),
    )


def _commands() -> dict[str, list[argparse.Action]]:
    """Return the options and arguments of each command, by its name."""
    for action in build_parser(every_command=True)._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {name: list(parser._actions) for name, parser in action.choices.items()}
    return {}
