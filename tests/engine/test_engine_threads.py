"""The threads that an engine reads and compiles in."""

import threading

import pytest

from svd2_jax.engine.devices import threads


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_has_not_begun_when_something_fails_is_left_undone(error):
    begun, given_up = [], threading.Event()

    def work(number):
        begun.append(number)
        given_up.wait(timeout=60)  # as long as that, programs are compiled

    def share_and_fail():
        with threads() as pool:
            several = [pool.submit(work, number) for number in range(100)]
            several[-1].add_done_callback(lambda _: given_up.set())
            raise error

    with pytest.raises(error):
        share_and_fail()
    assert given_up.is_set()
    assert len(begun) < 100


def test_everything_is_done_where_nothing_fails():
    done = []
    with threads() as pool:
        for number in range(100):
            pool.submit(done.append, number)
    assert sorted(done) == list(range(100))
