"""How commands and scripts begin and end: options that are wrong, errors and interruptions are one line."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from svd2_jax.errors import Svd2Error

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells report it


class OptionParser(argparse.ArgumentParser):
    """Says what is wrong with a command's options in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message}; `{self.prog} --help` shows the options\n")


def exit_code(run: Callable[[], int | None], interrupted: str) -> int:
    """Runs a command and returns its exit code; bad input becomes one line on standard error.

    Args:
      run: the command; returns its exit code, None for 0.
      interrupted: what is said when it is interrupted.
    """
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except Svd2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, ImportError) as e:
        if not _is_interrupt(e):
            raise
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        print(
            f"error: what the command prints cannot be written ({e.strerror}); free some space",
            file=sys.stderr,
        )
        return EXIT_FAILED


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C: a module written in C turns it into an ImportError while it is imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
