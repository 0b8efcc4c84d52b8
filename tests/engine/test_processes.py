"""Several processes draw one stream, as they would on several hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import one_of_two
import pytest

from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.media import VideoWriter, synthetic_clip

TIMEOUT_S = 400  # compiling, on a busy machine; what is tested takes seconds


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(command, log, **environment):
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, env={**os.environ, **environment},
        )  # fmt: skip


@pytest.mark.slow
def test_two_processes_of_two_devices_draw_the_video_of_one_even_when_blocks_change_processes(tmp_path):
    port, script = free_port(), Path(one_of_two.__file__)
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    both = [start([script, port, i, tmp_path / f"{i}.npy"], logs[i]) for i in range(2)]
    alone = np.concatenate(one_of_two.draw(DeviceEngine.random("golden")))
    try:
        for process, log in zip(both, logs, strict=True):
            assert process.wait(TIMEOUT_S) == 0, log.read_text()
    finally:
        for process in both:
            process.kill()
    assert not (tmp_path / "0.npy").exists()
    np.testing.assert_allclose(np.load(tmp_path / "1.npy"), alone, atol=1e-4)


@pytest.mark.slow
def test_a_process_that_dies_in_mid_stream_ends_the_others_with_one_line_and_no_file(tmp_path):
    clip, output = tmp_path / "in.mp4", tmp_path / "out.mp4"
    with VideoWriter(clip, 16, 32, 48) as writer:
        for _ in range(20):  # longer than the test takes
            writer.write(np.stack(list(synthetic_clip(200, 32, 48))))
    port, logs = free_port(), [tmp_path / f"{i}.log" for i in range(2)]
    command = [
        *("-c", "from svd2_jax.cli import entry_point; entry_point()"),
        *("run", "--checkpoint", "random:tiny", "--input", clip, "--output", output, "--prompt", "x"),
        *("--height", 32, "--width", 48, "--steps", 1, "--decoder", "taehv"),
        *("--stages", 2, "--no-rebalance", "--coordinator", f"localhost:{port}", "--num-processes", 2),
    ]
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    both = [start([*command, "--process-id", i], logs[i], **one_device) for i in range(2)]
    try:
        waiting_since = time.monotonic()
        while not list(tmp_path.glob(".out.*")) or "ready after" not in logs[1].read_text():
            assert both[1].poll() is None, logs[1].read_text()
            assert time.monotonic() - waiting_since < TIMEOUT_S
            time.sleep(0.05)
        time.sleep(1)  # into the stream
        both[0].send_signal(signal.SIGKILL)
        assert both[1].wait(20) == 2, logs[1].read_text()
    finally:
        for process in both:
            process.kill()
    last = logs[1].read_text().splitlines()[-1]
    assert last.startswith("error: process 0")
    assert "has died" in last
    assert "Traceback" not in logs[1].read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.log", "1.log", "in.mp4"]
