"""Processes on this host, joined by loopback: what each of them prints and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from svd2_jax.engine import cluster, rendezvous
from svd2_jax.errors import ConfigError, EngineError

LIMIT_S = 45.0  # a process that runs so long is killed, and its test fails
MISSING_S = 1.0  # how long those wait whom nobody joins
PEER_TIMEOUT_S = 2.0
NEVER_S = 3600.0
SLACK_S = 4.0  # two cores shared with other tests

WORKER = """
import os, signal, sys, time
from pathlib import Path
from svd2_jax.engine import cluster, rendezvous
from svd2_jax.errors import EngineError, Svd2Error

place, me, count, mode, peer_timeout_s, wait_timeout_s, say_s, file = sys.argv[1:]
victim = int(mode[-1]) if mode[-1].isdigit() else None
mode, me = mode.rstrip("0123456789"), int(me)

def work():
    with cluster.join(
        place, me, int(count), peer_timeout_s=float(peer_timeout_s), wait_timeout_s=float(wait_timeout_s),
        say_s=float(say_s),
    ) as group:
        Path(file).touch()
        group.on_loss(Path(file).unlink)
        import jax, numpy as np
        n = jax.device_count()
        mesh = jax.make_mesh((n,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        total = jax.jit(jax.shard_map(
            lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P()
        ))
        x = jax.make_array_from_callback(
            (n,), jax.NamedSharding(mesh, jax.P("d")), lambda i: np.arange(n, dtype=np.float32)[i]
        )
        if me == victim and mode == "absent":
            time.sleep(10**6)
        group.meet()
        if me == victim and mode == "again":
            time.sleep(10**6)
        group.meet()
        y = None
        for step in range(10**6):
            if me == victim and mode == "stuck" and step == 3:
                time.sleep(10**6)
            group.step()
            y = total(x).block_until_ready()
            if step == 3:
                print("looping", flush=True)
                if mode == "fine":
                    break
                if me == victim and mode == "raise":
                    raise EngineError("out of memory")
                if me == victim and mode == "bug":
                    raise ValueError("a bug")
                if me != victim and mode == "late":
                    break
            if me == victim and mode == "late" and step == 3:
                time.sleep(1.2 * float(peer_timeout_s))
                break
            time.sleep(0.02)
        print("sum", float(y.addressable_shards[0].data[0]), n, flush=True)
        Path(file).unlink()

if __name__ == "__main__":
    try:
        work()
    except Svd2Error as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
"""


class Processes:
    """Processes of one cluster; `start` gives each the same arguments but its number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: dict[int, subprocess.Popen[bytes]] = {}
        (folder / "worker.py").write_text(WORKER)

    def start(
        self,
        mode: str,
        count: int,
        host: str = "127.0.0.1",
        pause_s: float = 0,
        wait_timeout_s: float = NEVER_S,
        say_s: float = NEVER_S,
    ) -> None:
        place = f"{host}:{free_port()}"
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "http_proxy": "http://127.0.0.1:9",  # no one there; gRPC would wait for it
        }
        for i in range(count):
            command = [sys.executable, self.folder / "worker.py", place, i, count, mode]
            command += [PEER_TIMEOUT_S, wait_timeout_s, say_s, self.file(i)]
            with self.out(i).open("wb") as out, self.err(i).open("wb") as err:
                self.all[i] = subprocess.Popen([*map(str, command)], stdout=out, stderr=err, env=env)
            time.sleep(pause_s)

    def out(self, i: int) -> Path:
        return self.folder / f"{i}.out"

    def err(self, i: int) -> Path:
        return self.folder / f"{i}.err"

    def file(self, i: int) -> Path:
        return self.folder / f"{i}.partial"

    def wait_for_loops(self) -> None:
        def looping() -> bool:
            return all("looping" in self.out(i).read_text() for i in self.all)

        until(looping, LIMIT_S, lambda: "\n".join(self.err(i).read_text() for i in self.all))

    def end(self, i: int, timeout_s: float = LIMIT_S) -> tuple[int, list[str]]:
        """Returns the exit code and the lines of standard error behind the one that every process begins with."""
        code = self.all[i].wait(timeout_s)
        lines = self.err(i).read_text().splitlines()
        return code, lines[1:] if lines and " other process" in lines[0] else lines


def refusals(*arguments: dict[str, object], count: int = 2, ids: Sequence[int] = (0, 1)) -> list[Exception]:
    """Returns the errors of processes that are refused, each in a thread: they have not come to JAX by then."""
    port = free_port()

    def refusal(i: int, arguments: dict[str, object]) -> Exception:
        with pytest.raises((ConfigError, EngineError)) as raised:
            cluster.join(f"127.0.0.1:{port}", i, count, **arguments)
        return raised.value

    with ThreadPoolExecutor(len(ids)) as threads:
        return list(threads.map(refusal, ids, arguments))


def until(holds: Callable[[], bool], timeout_s: float, explain: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, explain()
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for process in made.all.values():
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)


# --- a cluster at work


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", socket.gethostname()])  # listens there, and on all addresses
def test_two_processes_sum_over_all_devices_and_end_well(processes: Processes, host: str) -> None:
    processes.start("fine", 2, host)
    for i in range(2):
        assert processes.end(i) == (0, [])
        assert "sum 6.0 4" in processes.out(i).read_text()  # 0 + 1 + 2 + 3


@pytest.mark.slow
def test_who_is_done_waits_for_those_who_still_work(processes: Processes) -> None:
    processes.start("late0", 2, say_s=PEER_TIMEOUT_S / 2)
    code, lines = processes.end(1)
    assert code == 0
    text = f"waiting for process 0 ({socket.gethostname()}): still at work (1 s; gives up after 3600 s)"
    assert text in lines
    assert processes.end(0)[0] == 0


# --- a peer that is not as far


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "victim", "late", "alone"),
    [
        ("absent", 1, "still loading or compiling", "; look at its output"),
        ("again", 1, "still loading or compiling", "; look at its output"),  # at the second meeting
        ("stuck", 0, "behind in the stream", ""),
    ],
)
def test_a_process_that_waits_says_for_whom_and_gives_up(
    processes: Processes, mode: str, victim: int, late: str, alone: str
) -> None:
    processes.start(f"{mode}{victim}", 2, wait_timeout_s=6, say_s=4)
    name, waits = socket.gethostname(), 1 - victim
    code, lines = processes.end(waits)
    assert code == 2
    *_, told, error = lines
    assert re.sub(r"4[\d.]* s; gives", "4 s; gives", told) == (
        f"waiting for process {victim} ({name}): {late} (4 s; gives up after 6 s)"
    )
    reason = f"gave up after 6 s waiting for process {victim} ({name}): {late}{alone}"
    assert error == f"error: {reason}"
    code, lines = processes.end(victim, SLACK_S)
    assert (code, lines[-1]) == (2, f"error: process {waits} ({name}) stopped: {reason}")


def test_a_process_says_who_has_not_arrived_whenever_the_wait_has_doubled() -> None:
    said: list[str] = []
    port = free_port()
    with pytest.raises(EngineError):
        cluster.join(f"127.0.0.1:{port}", 0, 2, timeout_s=1, say_s=0.2, say=said.append)
    assert said.pop(0) == f"waiting for 1 other process at 127.0.0.1:{port}"
    who = "waiting for process 1 (of 2) to start"
    assert said == [f"{who} ({s} s; gives up after 1 s)" for s in ("0.2", "0.4", "0.8")]


# --- a peer that is not there


@pytest.mark.parametrize(
    ("present", "text"),
    [
        (0, "process 1 (of 2) did not start within 1 s"),
        (1, "was not there within 1 s (Connection refused)"),
    ],
)
def test_a_peer_that_never_arrives_is_named_in_time(processes: Processes, present: int, text: str) -> None:
    port = free_port()
    began = time.monotonic()
    with pytest.raises(EngineError) as raised:  # in this process: no start of Python is measured with it
        cluster.join(f"127.0.0.1:{port}", present, 2, MISSING_S)
    assert text in str(raised.value)
    assert MISSING_S - 0.2 <= time.monotonic() - began < MISSING_S + 1


def test_those_who_arrived_all_hear_who_is_missing() -> None:
    for error in refusals({"timeout_s": MISSING_S}, {"timeout_s": MISSING_S}, count=4, ids=(0, 2)):
        assert type(error) is EngineError
        assert str(error).startswith("processes 1, 3 (of 4) did not start within 1 s; start the command")


def test_strangers_at_the_port_are_ignored() -> None:
    port = free_port()

    def call() -> None:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"greeting": 1}\n', b""):
            until(lambda text=text: sent(text), LIMIT_S, lambda: "no one listens")

    def sent(text: bytes) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(text)
        except ConnectionRefusedError:
            return False
        return True

    stranger = threading.Thread(target=call)
    stranger.start()
    with pytest.raises(EngineError, match=r"process 1 \(of 2\) did not start"):
        cluster.join(f"127.0.0.1:{port}", 0, 2, MISSING_S)
    stranger.join()


# --- what JAX sees of a lost peer


def test_a_relay_passes_on_that_its_near_end_closes_and_not_that_its_far_end_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = rendezvous.relay("127.0.0.1", service.getsockname()[1])
        for text in (b"lost", b"done"):
            with socket.create_connection(("127.0.0.1", port)) as near:
                near.settimeout(0.5)
                far = service.accept()[0]
                far.settimeout(LIMIT_S)
                near.sendall(text)
                assert far.recv(16) == text
                far.sendall(text)
                assert near.recv(16) == text
                if text == b"lost":
                    far.close()
                    with pytest.raises(TimeoutError):  # and not b"", its end
                        near.recv(16)
        assert far.recv(16) == b""
        far.close()


# --- a peer that is lost in mid-stream


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "how"),
    [
        (2, 1, signal.SIGKILL),
        (2, 0, signal.SIGKILL),
        (3, 1, signal.SIGTERM),
    ],  # JAX alone would ignore SIGTERM
)
def test_a_killed_peer_ends_the_others_at_once_with_one_line(
    processes: Processes, count: int, victim: int, how: signal.Signals
) -> None:
    # Of three, the second has come longer ago than a peer may be silent when the last one comes.
    processes.start("stream", count, pause_s=2 * PEER_TIMEOUT_S * (count > 2))
    processes.wait_for_loops()
    processes.all[victim].send_signal(how)
    began = time.monotonic()
    assert processes.end(victim, SLACK_S) == (-how, [])
    for i in set(range(count)) - {victim}:
        code, lines = processes.end(i, SLACK_S)
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith(f"error: process {victim} ({socket.gethostname()}) has died")
        assert not processes.file(i).exists()
    assert time.monotonic() - began < SLACK_S


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_peer_is_found_by_its_silence(processes: Processes, victim: int) -> None:
    processes.start("stream", 2)
    processes.wait_for_loops()
    processes.all[victim].send_signal(signal.SIGSTOP)
    code, lines = processes.end(1 - victim, PEER_TIMEOUT_S + SLACK_S)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: process {victim} ({socket.gethostname()}) has not answered for 2 s")
    assert not processes.file(1 - victim).exists()


@pytest.mark.slow
def test_an_error_of_one_is_told_to_the_others(processes: Processes) -> None:
    processes.start("raise0", 2)
    assert processes.end(0) == (2, ["error: out of memory"])
    assert processes.end(1) == (2, [f"error: process 0 ({socket.gethostname()}) stopped: out of memory"])


@pytest.mark.slow
def test_a_bug_of_one_shows_its_traceback_there_and_one_line_elsewhere(processes: Processes) -> None:
    processes.start("bug1", 2)
    code, lines = processes.end(1)
    assert code == 1
    assert lines[-1] == "ValueError: a bug"
    assert processes.end(0) == (
        2,
        [f"error: process 1 ({socket.gethostname()}) stopped: ValueError: a bug"],
    )


# --- arguments


def test_settings_that_differ_are_named_on_both_sides() -> None:
    name = socket.gethostname()
    text = f"process 1 ({name}) was started with --steps 4, process 0 ({name}) with 2; start the same"
    for error in refusals({"same": {"--steps": "2"}}, {"same": {"--steps": "4"}}):
        assert type(error) is ConfigError
        assert str(error).startswith(text)


def test_two_processes_of_one_number_are_both_refused() -> None:
    for error in refusals({}, {}, {}, count=3, ids=(0, 2, 2)):
        assert type(error) is ConfigError
        assert str(error).startswith("two processes have --process-id 2: ")


def test_without_arguments_a_process_is_alone() -> None:
    with cluster.join() as group:
        assert (group.process_id, group.num_processes) == (0, 1)
    assert cluster.join(num_processes=1).num_processes == 1
    assert cluster.join("host:1", 0, 1).num_processes == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((None, 1, None), "--coordinator HOST:PORT and --num-processes N are missing"),
        (("a:1", None, 2), "--process-id I is missing"),
        (("a:1", 2, 2), "--process-id must be 0 to 1 with --num-processes 2, got 2"),
        (("a:1", -1, 2), "--process-id must be 0 to 1"),
        ((None, None, 0), "--num-processes must be at least 1, got 0"),
        (("a", 0, 2), "expected HOST:PORT"),
        (("a:", 0, 2), "expected HOST:PORT"),
        ((":80", 0, 2), "expected HOST:PORT"),
        (("a:port", 0, 2), "expected HOST:PORT"),
        (("a:70000", 0, 2), "port of 1 to 65535, got 'a:70000'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str | None, int | None, int | None], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cluster.join(*arguments)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} cannot be used on this host"):
            cluster.join(f"127.0.0.1:{port}", 0, 2, MISSING_S)


def test_slurm_tells_what_the_arguments_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "JOB_ID": "4097",
        "STEP_NODELIST": "node[007-008]",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert rendezvous.place(None, None, None) == (("node007", 61441), 1, 2, 0)
    assert rendezvous.place("login:5000", None, None) == (("login", 5000), 1, 2, 0)
    assert rendezvous.place(None, None, 1) is None
