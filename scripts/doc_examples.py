"""Writes what the examples in README.md and docs/ print into these files.

python scripts/doc_examples.py            # runs the examples and updates the files
python scripts/doc_examples.py --check    # changes nothing, shows what differs; exit code 1 if anything does

An output is a fenced block under the line `<!-- output of the block above -->`. The block above that line is the
example: `svd2` commands in a `bash` block, or a program in a `python` block. Examples run on the CPU; choose such
whose output is the same on every machine and with every version of JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from svd2_jax import cli, files
from svd2_jax.command import exit_code
from svd2_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
MARK = "<!-- output of the block above -->"
EXIT_DIFFERENT = 1

# A block, the mark, and the block with the output.
EXAMPLE = re.compile(
    rf"^```(?P<language>bash|python)\n(?P<code>(?:(?!```).*\n)*)```\n\n?{MARK}\n```\n(?P<output>(?:(?!```).*\n)*)```$",
    re.MULTILINE,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Updates or checks the files and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help="Markdown files (default: README.md and docs/*.md)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="change nothing, show what differs")
    args = parser.parse_args(argv)
    paths = args.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return exit_code(lambda: _run(paths, args.check), "interrupted; the file at hand is as it was")


def _run(paths: Sequence[Path], check: bool) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # no command has used JAX yet
    different = False
    for path in paths:
        try:
            text = path.read_text()
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
        new = updated(path, text)
        if new == text:
            continue
        different = True
        if check:
            lines = text.splitlines(keepends=True), new.splitlines(keepends=True)
            print("".join(difflib.unified_diff(*lines, f"{path} (shown)", f"{path} (printed)")))
        else:
            files.write_whole(path, lambda part, new=new: part.write_text(new))
            print(f"{path}: updated")
    if check and different:
        print("to update these files: python scripts/doc_examples.py")
    return EXIT_DIFFERENT if check and different else 0


def updated(path: Path, text: str) -> str:
    """Returns a document's text with the present output of its examples.

    Raises:
      ConfigError: a mark is not between an example and its output, or an example fails.
    """
    examples = list(EXAMPLE.finditer(text))
    known = {match.start("output") for match in examples}
    for mark in re.finditer(rf"^{MARK}\n(```\n)?", text, re.MULTILINE):
        if mark.end() not in known:
            line = text.count("\n", 0, mark.start()) + 1
            raise ConfigError(
                f"{path}, line {line}: expected a bash or python block above the mark and a block below it"
            )
    for match in reversed(examples):
        output = printed(match["language"], match["code"], path)
        text = text[: match.start("output")] + output + text[match.end("output") :]
    return text


def printed(language: str, code: str, path: Path) -> str:
    """Returns what an example writes to standard output; raises ConfigError if a command fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(ROOT):
        if language == "python":
            exec(compile(code, str(path), "exec"), {})
            return out.getvalue()
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] != "svd2":
                raise ConfigError(f"{path}: only svd2 commands can be run, got {line!r}")
            if words and (failed := _exit_code(words[1:])):
                raise ConfigError(f"{path}: {line!r} failed with exit code {failed}")
    return out.getvalue()


def _exit_code(options: Sequence[str]) -> int | str | None:
    try:
        return cli.main(options)
    except SystemExit as e:  # argparse
        return e.code


if __name__ == "__main__":
    raise SystemExit(main())
