"""Files that are written: refused before the work, and whole or not there behind it."""

import json
import os
import threading
from pathlib import Path

import pytest

from svd2_jax import files
from svd2_jax.errors import MediaError


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_that_cannot_be_written_is_refused_beforehand(tmp_path):
    files.check_target(tmp_path / "new.json")
    (tmp_path / "old.json").write_text("old")
    files.check_target(tmp_path / "old.json")
    with pytest.raises(MediaError, match="is a folder, expected a file name to write"):
        files.check_target(tmp_path)
    with pytest.raises(MediaError, match="none does not exist; create it first"):
        files.check_target(tmp_path / "none" / "x.json")
    assert names(tmp_path) == {"old.json"}


def test_a_folder_without_the_right_to_write_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    with pytest.raises(MediaError, match="cannot be written to"):
        files.check_target(tmp_path / "new.json")


def test_a_file_takes_the_place_of_an_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(part):
        part.write_text("new")
        assert part.suffix == ".json"
        assert path.read_text() == "old"

    files.write_whole(path, write)
    assert path.read_text() == "new"
    assert names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a fault of ours")])
def test_what_fails_half_way_leaves_all_as_it_was(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(part):
        part.write_text("ne")
        raise error

    kind = MediaError if isinstance(error, OSError) else ValueError
    with pytest.raises(kind, match=r"a\.json: cannot be written \(No space left on device\)|ours"):
        files.write_whole(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.json"}


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    files.write_whole(path, lambda target: target.write_text("numbers"))
    reader.join()
    assert read == ["numbers"]
    assert path.is_fifo()


def test_a_chart_is_a_png(tmp_path):
    files.check_chart(tmp_path / "a.PNG")
    with pytest.raises(MediaError, match=r"a chart's name ends in \.png"):
        files.check_chart(tmp_path / "a.jpg")


def test_values_that_are_no_numbers_are_refused_where_they_may_not_be(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, None]}, allow_nan=False)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "b.json", {"a": float("nan")}, allow_nan=False)
    assert names(tmp_path) == {"a.json"}


def test_an_output_is_no_input_and_no_other_output_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, link = tmp_path / "a.mp4", tmp_path / "link.mp4"
    source.write_text("a")
    link.symlink_to(source)
    for path in (source, link, Path("a.mp4"), Path("none/../a.mp4")):
        with pytest.raises(MediaError, match=r"--output .*: is the same file as --input .*a\.mp4"):
            files.check_apart([("--output", path)], [("--input", source)])
    with pytest.raises(MediaError, match=r"--chart new\.png: is the same file as --json new\.png"):
        files.check_apart([("--json", Path("new.png")), ("--chart", Path("new.png"))])
    files.check_apart(
        [("--output", Path("b.mp4")), ("--json", None)], [("--input", source), ("--config", None)]
    )
    files.check_apart([("--metrics", Path("/dev/null")), ("--output", "udp://a")], [("--input", "udp://a")])
