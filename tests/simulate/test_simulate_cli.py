"""`svd2 simulate` as a user types it: what it prints and writes, and what it says when something is wrong."""

import functools
import json
import subprocess
import sys

import pytest
from PIL import Image

TRACE = {
    "name": "small",
    "description": "For tests.",
    "duration_s": 12,
    "device": {"fixed_ms": 60, "row_ms": 20},
    "streams": [{"rate_hz": 16, "budget_ms": 700}],
}
SLOWED = {**TRACE, "name": "slowed", "device": {"fixed_ms": 60, "row_ms": 20, "speed": [[4, 0.1], [6, 1]]}}


@pytest.fixture
def simulate(svd2):
    return functools.partial(svd2, "simulate")


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(TRACE))
    return path


@pytest.fixture
def slowed(tmp_path):
    path = tmp_path / "slowed.json"
    path.write_text(json.dumps(SLOWED))
    return path


def test_a_trace_becomes_a_line_of_numbers(simulate, trace):
    code, out, err = simulate(trace, "--no-progress")
    assert (code, err) == (0, "")
    head, line = out.splitlines()
    assert head.split()[:7] == ["trace", "policy", "load", "frames", "impossible", "shown", "late"]
    # 16 frames/s at 66.7 frames/s of one step; a frame every 62.5 ms for 12 s
    assert line.split()[:7] == ["small", "deadline", "0.24", "192", "0", "192", "0"]
    assert line.endswith("ok")


def test_all_policies_are_compared_and_everything_is_written(simulate, trace, slowed, tmp_path):
    numbers, chart = tmp_path / "numbers.json", tmp_path / "chart.png"
    code, out, err = simulate(trace, slowed, "--policy", "all", "--json", numbers, "--chart", chart)
    assert code == 1  # nobody keeps 700 ms when a tick takes 800
    *lines, first, second = out.splitlines()[1:]
    assert (first, second) == (f"{numbers}: written", f"{chart}: written")
    assert [line.split()[:2] for line in lines] == [
        [name, policy]
        for name in ("small", "slowed")
        for policy in ("deadline", "bounded", "fifo", "reference")
    ]
    rows = json.loads(numbers.read_text())
    assert [(row["trace"], row["policy"]) for row in rows][:2] == [
        ("small", "deadline"),
        ("small", "bounded"),
    ]
    assert rows[0]["frames"] == rows[0]["shown"] == 192
    assert rows[0]["missed_goals"] == []
    assert "misses" in rows[4]["missed_goals"]
    with Image.open(chart) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert "small, deadline" in err  # the progress bar
    assert {p.name for p in tmp_path.iterdir()} == {
        "small.json",
        "slowed.json",
        "numbers.json",
        "chart.png",
    }


def test_a_missed_goal_is_exit_code_1_only_for_the_policy_that_has_goals(simulate, slowed):
    assert simulate(slowed, "--no-progress")[0] == 1
    assert simulate(slowed, "--no-progress", "--policy", "fifo")[0] == 0


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "t.json: cannot be read (No such file or directory)"),
        ("", [], "t.json: is not JSON (line 1: Expecting value)"),
        ("{}", [], "t.json: 'name' is missing"),
        (json.dumps({**TRACE, "speed": 1}), [], "t.json: unknown key 'speed'; known are name, description"),
        (json.dumps({**TRACE, "duration_s": 0}), [], "t.json: duration_s must be 0.1 to 86400, got 0"),
        (json.dumps(TRACE), ["--json", "no/folder/x.json"], "the folder no/folder does not exist"),
        (json.dumps(TRACE), ["--chart", "."], "is a folder, expected a file name to write"),
        (json.dumps(TRACE), ["--chart", "x.mp4"], "x.mp4: a chart's name ends in .png"),
    ],
)
def test_what_cannot_be_done_is_one_line(simulate, tmp_path, content, options, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    code, out, err = simulate(path, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_bad_trace_behind_a_good_one_is_found_before_anything_runs(simulate, trace, tmp_path):
    assert simulate(trace, tmp_path / "missing.json")[:2] == (2, "")


def test_an_unknown_policy_is_refused_with_the_known_ones(simulate, trace):
    code, _, err = simulate(trace, "--policy", "best")
    assert code == 2
    assert "deadline" in err
    assert "reference" in err


def test_the_help_shows_examples_and_explains_the_columns(simulate):
    code, out, _ = simulate("--help")
    assert code == 0
    assert "example" in out
    assert "\n  svd2 simulate " in out
    assert all(word in out for word in ("of capacity", "recovery", "misses", "Exit code 1"))


def test_a_simulation_loads_no_jax(trace):
    code = (
        "import sys; from svd2_jax import cli; cli.main(sys.argv[1:]); "
        "sys.exit(1 if {'jax', 'jaxlib', 'flax', 'matplotlib'} & set(sys.modules) else 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "simulate", trace, "--no-progress"], check=True, capture_output=True
    )
