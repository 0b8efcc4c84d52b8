"""What a person is told while something takes long."""

import contextlib
import dataclasses
import io
import threading

from svd2_jax import progress
from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig, VAEConfig, preset
from svd2_jax.engine.engine import DeviceEngine


class Terminal(io.StringIO):
    """A terminal that tells when it shows a text."""

    def __init__(self, awaited: str):
        super().__init__()
        self.awaited, self.shows = awaited, threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.awaited in text:
            self.shows.set()
        return super().write(text)


def test_what_is_not_over_yet_is_told_again_and_again():
    told, seen = [], threading.Event()

    def say(line):
        told.append(line)
        if len(told) == 3:
            seen.set()

    with (
        progress.shown("getting ready", say, io.StringIO(), quiet_s=0.02),
        progress.working("compiling tick"),
        progress.working("reading dit.head"),
    ):
        assert seen.wait(20)
    assert told[0].startswith("  getting ready, 0 s: compiling tick, reading dit.head")
    count = len(told)
    with progress.working("something else"):
        assert len(told) == count  # nobody follows any more


def test_work_of_other_threads_is_told_and_a_failure_takes_it_away():
    told, seen = [], threading.Event()

    def say(line):
        told.append(line)
        if "encode" in line:
            seen.set()

    def fail():
        with contextlib.suppress(ValueError), progress.working("compiling encode chunk"):
            assert seen.wait(20)
            raise ValueError

    with progress.shown("getting ready", say, io.StringIO(), quiet_s=0.02):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        told.clear()
        with progress.working("the rest"):
            while not told:
                pass
        assert "encode" not in told[0]


def test_a_terminal_shows_what_is_not_over_yet_in_its_last_line():
    terminal = Terminal("getting ready, 0 s: compiling tick")
    with progress.shown("getting ready", lambda _: None, terminal), progress.working("compiling tick"):
        assert terminal.shows.wait(20)


def test_opening_a_stream_tells_the_weights_and_the_programs_by_name():
    told = []
    with progress.shown("getting ready", told.append, io.StringIO(), quiet_s=0.001):
        # Sizes that no other test has, so that no program is kept.
        model = dataclasses.replace(preset("golden"), vae=VAEConfig(dim=4, num_res_blocks=1))
        cfg = StreamConfig(height=16, width=112, timesteps=(700,))
        DeviceEngine.random(model).open(SessionSpec("a dog", cfg)).close()
    text = "\n".join(told)
    for what in (
        "drawing dit.block",
        "compiling tick, 1 step",
        "compiling encode first group",
        "compiling decode chunk",
    ):
        assert what in text
