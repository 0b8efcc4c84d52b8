"""The command line, `svd2 COMMAND`: a module a command, with its `Options`, `run`, and a docstring that is its help.

What `--help` needs loads neither JAX nor NumPy, so modules of commands import such things in the functions that run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from svd2_jax.command import OptionParser, exit_code

COMMANDS = ("run", "live", "convert", "verify", "eval", "bench", "plan", "simulate", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; bad input becomes one line on standard error."""

    def run() -> int:
        args = parser().parse_args(argv)
        return args.command.run(args.command.Options.from_args(args))

    return exit_code(run, "interrupted; nothing was written")


def entry_point() -> None:
    """The console command."""
    sys.exit(main())


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; what it parses holds the command's module as `command`."""
    whole = OptionParser(
        prog="svd2",
        description="Live video re-drawn to a text prompt.",
        epilog="`svd2 COMMAND --help` shows each command's options and examples.",
    )
    whole.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"svd2_jax.cli.{name}")
        text, _, examples = (module.__doc__ or "").removeprefix(f"`svd2 {name}`: ").partition(".\n\n")
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.Options.add_to(command)
        command.set_defaults(command=module)
    return whole


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # takes as long as all the rest of `--help`

        print(f"svd2-jax {version('svd2-jax')}")
        parser.exit()
