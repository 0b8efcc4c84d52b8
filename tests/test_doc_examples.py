"""`scripts/doc_examples.py`: the documentation shows what its examples print, and the script tells when it does not."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "doc_examples.py"
MARK = "<!-- output of the block above -->"
SUM = f"```python\nprint(1 + 1)\n```\n\n{MARK}\n```\n3\n```\n"


@pytest.fixture(scope="module")
def doc_examples():
    spec = importlib.util.spec_from_file_location("doc_examples", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def document(tmp_path):
    return tmp_path / "document.md"


def test_the_documentation_shows_what_its_examples_print(doc_examples, capsys):
    assert (ROOT / "README.md").read_text().count(MARK) == 2  # a plan and a program
    assert doc_examples(["--check"]) == 0, capsys.readouterr().out


def test_a_check_shows_what_differs_and_changes_nothing(doc_examples, document, capsys):
    document.write_text(SUM)
    assert doc_examples([str(document), "--check"]) == 1
    assert {"-3", "+2"} <= set(capsys.readouterr().out.splitlines())
    assert document.read_text() == SUM


def test_outputs_are_written_and_everything_else_stays(doc_examples, document):
    around = (
        "```python\nprint(5)\n```\n\n{}Text.\n\n```bash\nsvd2 --version  # which?\n```\n"
        + MARK
        + "\n```\n```\n"
    )
    document.write_text(around.format(SUM))
    assert doc_examples([str(document)]) == 0
    text = document.read_text()
    assert text.startswith(around.format(SUM.replace("3", "2")).removesuffix("```\n"))
    assert text.endswith(f"```\nsvd2-jax {version('svd2-jax')}\n```\n")
    assert doc_examples([str(document), "--check"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUM.replace("python", "text"), "line 5: expected a bash or python block above"),
        (SUM.replace("```\n3\n", ""), "line 5: expected a bash or python block above"),
        (SUM.replace("python\nprint(1 + 1)", "bash\nsvd2 plan --preset none"), "failed with exit code 2"),
        (SUM.replace("python\nprint(1 + 1)", "bash\nsvd2 plan --stagess 4"), "failed with exit code 2"),
        (SUM.replace("python\nprint(1 + 1)", "bash\nrm -rf out"), "only svd2 commands can be run"),
    ],
    ids=["no example above", "no output below", "command fails", "unknown option", "another program"],
)  # fmt: skip
def test_an_example_that_cannot_be_run_is_one_line(doc_examples, document, capsys, text, message):
    document.write_text(text)
    assert doc_examples([str(document)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {document}")
    assert message in error
    assert document.read_text() == text


def test_a_file_that_is_not_there_is_one_line(doc_examples, document, capsys):
    assert doc_examples([str(document)]) == 2
    assert capsys.readouterr().err == f"error: {document}: cannot be read (No such file or directory)\n"
