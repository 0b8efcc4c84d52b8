"""Several processes draw one stream, as they would on several hosts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import one_of_two
import pytest
import reads_its_part

from svd2_jax import shipped
from svd2_jax.media import VideoReader, VideoWriter, synthetic_clip, writer
from svd2_jax.models import dit

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


def end_well(processes, logs):
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(TIMEOUT_S) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_four_processes_each_read_their_part_of_a_checkpoint_and_wait_for_who_is_late(
    tmp_path, golden_checkpoint
):
    port, tiny = free_port(), shipped.checkpoint_folder(shipped.TINY)
    cases = [f"{golden_checkpoint}=1,1,1,1", f"{tiny}=2,1,1,1", f"{tiny}=1,1,1,2"]
    logs, file = [tmp_path / f"{i}.log" for i in range(4)], tmp_path / "go on"
    four = [start([reads_its_part.__file__, port, i, 4, file, *cases], log) for i, log in enumerate(logs)]
    late = r"waiting for .*process 3 \(.*\): still loading or compiling \(\d+ s; gives up after 1800 s\)"
    waiting_since = time.monotonic()
    while not all(re.search(late, log.read_text()) for log in logs[:3]):
        if any(process.poll() for process in four) or time.monotonic() - waiting_since > TIMEOUT_S:
            break
        time.sleep(0.05)
    said = all(re.search(late, log.read_text()) for log in logs[:3])
    file.touch()
    end_well(four, logs)
    assert said
    lines = [[x for x in log.read_text().splitlines() if not x.startswith("waiting")] for log in logs]
    ends = [dit.embed_item(), dit.head_item()]
    for line, blocks in zip(
        range(3), [("0", "1", "2", "3"), ("01", "2", "3", "4"), ("0", "1", "2", "34")], strict=True
    ):
        read = [[dit.block_item(int(i)) for i in which] + ends for which in blocks]
        read[0], read[3] = ["vae.encoder", *read[0]], ["vae.decoder", *read[3]]
        assert [of_process[line].split() for of_process in lines] == read
    assert "one process writes a checkpoint" in lines[3][3]


@pytest.mark.slow
def test_the_example_of_two_hosts_draws_the_video_of_one_process(tmp_path, svd2, monkeypatch):
    # Lossless: at the usual quality the codec makes of one value's rounding a difference of 2 in all of them.
    monkeypatch.setitem(writer._H264, "crf", "0")
    clip, port = tmp_path / "in.mp4", free_port()
    with VideoWriter(clip, 16, 32, 48) as file:
        file.write(np.stack(list(synthetic_clip(13, 32, 48))))
    command = [
        "-c",
        "from svd2_jax.media import writer; writer._H264['crf'] = '0';"
        "from svd2_jax.cli import entry_point; entry_point()",
        *("run", "--checkpoint", "tiny", "--input", clip, "--prompt", "a film noir"),
        *("--height", 32, "--width", 48, "--steps", 1),  # less to compile
    ]
    assert svd2(*command[2:], "--output", tmp_path / "one.mp4")[0] == 0
    hosts = ["--stages", 4, "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2]
    two_devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    both = [
        start(
            [*command, *hosts, "--process-id", i, "--output", tmp_path / "both.mp4"],
            log, **two_devices,
        )
        for i, log in enumerate(logs)
    ]  # fmt: skip
    end_well(both, logs)
    with (
        VideoReader(tmp_path / "both.mp4", 32, 48) as got,
        VideoReader(tmp_path / "one.mp4", 32, 48) as wanted,
    ):
        got, wanted = np.stack(list(got)), np.stack(list(wanted))
    assert got.shape == wanted.shape == (13, 32, 48, 3)
    # A stage more may round a value to the next of 256.
    assert np.abs(got.astype(np.int16) - wanted).mean() < 0.05


@pytest.mark.slow
def test_two_processes_of_two_devices_draw_the_video_of_one_on_the_split_that_they_measured_together(
    tmp_path, golden_checkpoint, engine
):
    port, script = free_port(), Path(one_of_two.__file__)
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    both = [
        start([script, port, i, golden_checkpoint, tmp_path / f"{i}.npy"], log) for i, log in enumerate(logs)
    ]
    alone = np.concatenate(one_of_two.draw(engine))
    end_well(both, logs)
    assert not (tmp_path / "0.npy").exists()
    np.testing.assert_allclose(np.load(tmp_path / "1.npy"), alone, atol=1e-4)


@pytest.mark.slow
def test_a_process_that_dies_in_mid_stream_ends_the_others_with_one_line_and_no_file(tmp_path):
    clip, output = tmp_path / "in.mp4", tmp_path / "out.mp4"
    with VideoWriter(clip, 16, 32, 48) as file:
        for _ in range(20):  # longer than the test takes
            file.write(np.stack(list(synthetic_clip(200, 32, 48))))
    port, logs = free_port(), [tmp_path / f"{i}.log" for i in range(2)]
    command = [
        *("-c", "from svd2_jax.cli import entry_point; entry_point()"),
        *("run", "--checkpoint", "random:tiny", "--input", clip, "--output", output, "--prompt", "x"),
        *("--height", 32, "--width", 48, "--steps", 1, "--decoder", "taehv"),
        *("--stages", 2, "--split", "3,2", "--coordinator", f"localhost:{port}", "--num-processes", 2),
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
