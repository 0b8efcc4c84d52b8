"""Runs `scripts/stream_demo.py` on small random weights, and watches its memory and its compiler meanwhile.

python benchmarks/live_cpu.py --seconds 600 --fps 8 --out live
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from svd2_jax import media

ROOT = Path(__file__).parents[1]
SIZE = 64  # pixels in both directions
MIB = 1 << 20


def resident_mib(pid: int) -> float:
    """Returns the memory of a process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def main() -> None:
    """Runs it, and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("live"), help="names of the results, without suffix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "in.mp4"
        with media.VideoWriter(clip, args.fps, SIZE, SIZE) as writer:
            for frame in media.synthetic_clip(40 * int(args.fps), SIZE, SIZE):
                writer.write(frame[None])
        command = [
            sys.executable, ROOT / "scripts" / "stream_demo.py", "--checkpoint", "random:tiny",
            "--input", clip, "--loop", "--height", SIZE, "--width", SIZE, "--fps", args.fps,
            "--seconds", args.seconds, "--streams", args.streams, "--prompt", "a watercolour painting",
            "--output", Path(folder) / "out.mp4", "--metrics", Path(folder) / "out.jsonl",
            "--chart", args.out.with_suffix(".png"),
        ]  # fmt: skip
        watch([str(word) for word in command], args.seconds)
        last = (Path(folder) / "out.jsonl").read_text().splitlines()[-1]
        args.out.with_suffix(".json").write_text(last + "\n")


def watch(command: list[str], seconds: float) -> None:
    """Runs the command; prints its output, its memory each minute, and what it compiled once it was live."""
    environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    live, compiled = threading.Event(), []

    def read(stream) -> None:
        for line in stream:
            if line.startswith("Compiling "):
                compiled.append((live.is_set(), line[:100]))
            elif not line.startswith(("Finished ", "TRACING ", "Persistent ", "Not ")):
                print(line, end="", flush=True)
            if line.startswith("live;"):
                live.set()

    reader = threading.Thread(target=read, args=(process.stderr,))
    reader.start()
    live.wait()
    started, memory = time.monotonic(), []
    while process.poll() is None and (at := time.monotonic() - started) < seconds:
        memory.append((at, resident_mib(process.pid)))
        time.sleep(1)
    process.wait()
    reader.join()
    first = min((m for at, m in memory if at >= 60), default=memory[-1][1])
    for at, mib in memory[::60]:
        print(f"{at / 60:5.1f} min {mib:7.1f} MiB")
    growth = max(m for at, m in memory if at >= 60 or len(memory) < 60) - first
    print(
        f"growth after the first minute: {growth:.1f} MiB at most, {memory[-1][1] - first:.1f} MiB at the end"
    )
    late = [line for is_live, line in compiled if is_live]
    print(f"programs compiled before the streams were open: {len(compiled) - len(late)}, after: {len(late)}")
    for line in late:
        print("  ", line)


if __name__ == "__main__":
    main()
