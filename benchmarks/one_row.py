"""How much sooner a chunk that is pushed on alone is finished in ticks that compute one row; see one_row.md.

usage: python benchmarks/one_row.py
"""

import statistics
import time

import numpy as np

import svd2_jax
from svd2_jax import SessionSpec
from svd2_jax.api import TickInput

ROUNDS, WARM = 30, 2


def main() -> None:
    """Pushes chunks through two equal streams in turn, of which one has the programs for single rows."""
    engines = [svd2_jax.load("tiny") for _ in range(2)]
    for steps in (2, 4):
        cfg = engines[0].stream_config(steps=steps)
        spec, frames = (
            SessionSpec("winter", cfg),
            np.zeros((cfg.first_frames, cfg.height, cfg.width, 3), np.uint8),
        )
        # Asking for steps prepares all that live streams need, and with it ticks of one row.
        sessions = [engines[0].open(spec), engines[1].open(spec, steps=(steps,))]
        times: list[list[float]] = [[], []]
        for engine, session in zip(engines, sessions, strict=True):
            engine.tick([TickInput(session, frames)]).wait()
        for _ in range(ROUNDS):
            for engine, session, taken in zip(engines, sessions, times, strict=True):
                began = time.perf_counter()
                for step in range(steps):
                    engine.tick([TickInput(session, None if step else frames[: cfg.chunk_frames])]).wait()
                taken.append(time.perf_counter() - began)
        whole, one = (1000 * statistics.median(taken[WARM:]) for taken in times)
        print(
            f"{steps} steps: {whole:.0f} ms in ticks of all rows, {one:.0f} ms of one row: {one / whole:.2f}"
        )
        for session in sessions:
            session.close()


if __name__ == "__main__":
    main()
