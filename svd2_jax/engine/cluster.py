"""Several processes that run one pipeline: how they meet, watch each other, and end together.

Every process calls `join` before JAX opens its devices:

    with cluster.join(args.coordinator, args.process_id, args.num_processes) as group:
        group.on_loss(writer.discard)
        ...  # load and compile
        group.meet()
        ...  # stream, and call group.step() whenever it gets on

A process that waits for a collective cannot be interrupted from Python, and gloo and NCCL wait without end
for a peer that is gone. JAX's own coordination service does notice it, but its answer is to abort the
process: a page of C++ text and a core dump instead of one line, and no chance to remove a half-written file.
Its only hook, the `missed_heartbeat_callback` of a private function, fails with std::bad_cast for any Python
function, and `jax_enable_recoverability` turns the abort into an endless wait (jax 0.10.2 and 0.12.0.1). So:

- The processes meet over a TCP connection of their own, one from each to process 0 at the coordinator's
  address, and `jax.distributed` is started when all are there. Who is missing can then be told by name.
- The connection stays, and a thread watches it: it closes at once when a process dies, and a process that is
  stopped or cut off sends no heartbeat. The watcher tells the others, runs the callbacks of `on_loss`, prints
  one line and ends the process with `EXIT_LOST`.
- JAX's heartbeats are made so rare that they do not speak first. But its client also aborts as soon as the
  connection to process 0 closes; therefore it speaks through a relay inside its own process, which keeps
  JAX's end open when the other one is gone.
- Every heartbeat says how far its process is, and process 0 tells all of it to all. So a process that waits says for
  whom, and gives up after a stated time.
- The processes meet once more before the first collective: gloo gives the last one 30 s to come there, and compiling
  may take one process longer than another.
- gRPC is told to use no web proxy for that relay; where `http_proxy` is set JAX would else hang.
- A process that fails tells the others why, and leaves without JAX's shutdown, which would wait for them.
- JAX's preemption service is off: it catches SIGTERM, and `kill` would no longer end the process.

Messages are lines of JSON and carry no secrets; like JAX's own service they are neither signed nor encrypted,
so the coordinator's port belongs on a network that is trusted. Two peers that reach process 0 but not each
other are not told apart from two that are slow.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

import jax

from svd2_jax.errors import EXIT_INTERRUPTED, ConfigError, EngineError, Svd2Error

ARRIVAL_TIMEOUT_S = 60.0
"""How long a process waits for the others; hosts of one job may start that far apart."""
PEER_TIMEOUT_S = 30.0
"""A peer that is silent so long counts as lost; far above what loading or compiling holds a thread up."""
START_TIMEOUT_S = 60.0
"""How long `jax.distributed` may take to start when all processes are there; it takes a second."""
WAIT_TIMEOUT_S = 1800.0
"""How long one that is ready, or done, waits for the others, and a stream for its next step. A slow disk needs minutes
to load 14B, and compiling takes minutes too."""
SAY_S = 10.0
"""After how long a wait is told of for the first time; then whenever it has lasted twice as long."""
BEATS_PER_TIMEOUT = 6
VERDICT_S = 2.0
"""How long an error that a lost peer may have caused waits for the watcher, who knows the reason."""
CLEANUP_S = 5.0
"""How long the callbacks of `on_loss` may take together."""
HELLO_TIMEOUT_S = 2.0
RETRY_S = 0.1
EXIT_LOST = 2
EXIT_FAILED = 1

_GREETING = "svd2 cluster 2"  # the version of these messages
_MAX_LINE = 1 << 16
_START_ALL = "start the command on every host, and look for errors there"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NO_PROXY = "no_grpc_proxy"  # gRPC reads it in this spelling, and `no_proxy` where it is not set
_NEVER_S = 10**6  # for JAX's own heartbeats: 11 days

# How far a process is. Each meeting counts one more than the one before, and each step of its stream likewise.
_STARTED, _STREAMING, _DONE = 0, 1 << 16, 1 << 62

_exit_code: int | None = None  # set by `Cluster.fail`


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Wait:
    """A wait for other processes: how long it may take, after how long it is told of, and how."""

    timeout_s: float
    say_s: float
    say: Callable[[str], object]

    def tell(self, what: str, seconds: float) -> None:
        self.say(f"waiting for {what} ({round(seconds, 1):g} s; gives up after {self.timeout_s:g} s)")

    @contextlib.contextmanager
    def told(self, what: Callable[[], str]) -> Iterator[None]:
        """Tells of the wait that the body is, from another thread; `what` is asked each time what it is for."""
        over = threading.Event()

        def speak() -> None:
            waited_s, next_s = 0.0, self.say_s
            while not over.wait(next_s - waited_s):
                self.tell(what(), next_s)
                waited_s, next_s = next_s, 2 * next_s

        threading.Thread(target=speak, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def join(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    timeout_s: float = ARRIVAL_TIMEOUT_S,
    peer_timeout_s: float = PEER_TIMEOUT_S,
    same: Mapping[str, str] | None = None,
    wait_timeout_s: float = WAIT_TIMEOUT_S,
    say_s: float = SAY_S,
    say: Callable[[str], object] = _say,
) -> Cluster:
    """Meets the other processes, starts `jax.distributed` and returns the cluster, watched from then on.

    What the arguments leave out comes from SLURM or Open MPI; without either and without arguments, the
    cluster is this process alone and nothing is started. Must be called before JAX opens its devices.

    Args:
      coordinator: HOST:PORT of process 0; the port must be free there.
      process_id: 0 to num_processes - 1, another one for each process.
      num_processes: The same on all of them.
      timeout_s: How long to wait for process 0, and how long process 0 waits for the others.
      peer_timeout_s: Silence after which a peer counts as lost; process 0's value counts for all.
      same: Settings, by name, that must agree on all processes; the versions of JAX and of this package
          always must.
      wait_timeout_s: How long the cluster waits for others that are alive but not as far.
      say_s: After how long a wait is told of for the first time.
      say: Gets a line that says who is waited for, in any thread; by default it goes to standard error.

    Raises:
      ConfigError: The arguments are malformed, incomplete or contradict each other or those of a peer.
      EngineError: A peer did not start in time, or JAX could not be started.
    """
    place = _place(coordinator, process_id, num_processes)
    wait = _Wait(wait_timeout_s, say_s, say)
    if place is None:
        return Cluster(0, 1, (socket.gethostname(),), {}, peer_timeout_s, wait)
    (host, port), me, count, local_id = place
    if jax.distributed.is_initialized():
        raise EngineError("this process is in a cluster already; expected one join per process")
    hello = {
        "greeting": _GREETING,
        "process": me,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "same": {
            "--num-processes": str(count),
            "svd2-jax": importlib.metadata.version("svd2-jax"),
            "jax": jax.__version__,
            **(same or {}),
        },
    }
    arrival = _Wait(timeout_s, say_s, say)
    say(f"waiting for {_others(count)} at {host}:{port}")
    if me == 0:
        links, hosts = _await_peers(host, port, hello, count, arrival)
        reserved = _reserve_port()
        service_port = reserved.getsockname()[1]
        for link in links.values():
            link.send(kind="welcome", hosts=hosts, port=service_port, peer_timeout_s=peer_timeout_s)
        relay = None
        address = f"[::1]:{service_port}" if host == "::1" else f"127.0.0.1:{service_port}"
        bind = address if host in _LOOPBACK else f"[::]:{service_port}"
    else:
        link, welcome = _await_welcome(host, port, hello, arrival)
        links, hosts, peer_timeout_s = {0: link}, welcome["hosts"], float(welcome["peer_timeout_s"])
        reserved, bind = None, None
        relay = _Relay(host, int(welcome["port"]))
        address = f"127.0.0.1:{relay.port}"

    cluster = Cluster(me, count, tuple(hosts), links, peer_timeout_s, wait, relay)
    cluster._start()
    # JAX would wait on, for 300 s, and then abort.
    late = threading.Timer(START_TIMEOUT_S, cluster._lost, (_late_text(host),))
    late.daemon = True
    late.start()
    try:
        jax.config.update("jax_enable_preemption_service", False)
        _let_loopback_pass_proxies()
        # JAX gives each SLURM or Open MPI task one device of its host. One task per host takes all of them.
        alone_here = list(hosts).count(hosts[me]) == 1
        with _Wait(START_TIMEOUT_S, say_s, say).told(lambda: "jax.distributed to start"):
            jax.distributed.initialize(
                address,
                count,
                me,
                local_device_ids=None if local_id is None or alone_here else local_id,
                cluster_detection_method="deactivate",
                coordinator_bind_address=bind,
                heartbeat_timeout_seconds=_NEVER_S,
            )
    except Exception as e:
        text = f"jax.distributed could not be started ({_first_line(e)})"
        cluster.fail(text)
        raise EngineError(text) from e
    except BaseException as e:  # Ctrl-C
        cluster.fail(_reason(e), _code(e))
        raise
    finally:
        late.cancel()
        if reserved is not None:
            reserved.close()
    return cluster


class Cluster:
    """The processes that run together, seen from one of them; made by `join`.

    As a context it calls `leave` at a normal end and `fail` when an error passes through.

    Attributes:
      process_id: Of this process; 0 is the coordinator.
      num_processes: Of the whole cluster; 1 if this process is alone.
      hosts: The host name of each process.
    """

    def __init__(
        self,
        process_id: int,
        num_processes: int,
        hosts: tuple[str, ...],
        links: dict[int, _Link],
        peer_timeout_s: float,
        wait: _Wait,
        relay: _Relay | None = None,
    ) -> None:
        self.process_id = process_id
        self.num_processes = num_processes
        self.hosts = hosts
        self._links = links  # to all others at process 0, to process 0 elsewhere
        self._peer_timeout_s = peer_timeout_s
        self._wait = wait
        self._relay = relay
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._over = False  # left, failed or ending: nothing that a peer does matters any more
        self._gone: set[int] = set()
        self._at = dict.fromkeys(range(num_processes), _STARTED)  # how far each is known to be
        self._moved = threading.Condition()  # of the line above
        self._stepped_at = time.monotonic()
        self._say_stream_at_s = wait.say_s

    def on_loss(self, callback: Callable[[], object]) -> None:
        """Has `callback` run, on the watcher's thread, before a lost peer ends this process; the latest first.

        It must not touch JAX and has `CLEANUP_S` seconds, shared with the others; what it raises is ignored.
        The line that says who was lost comes after it, so a progress bar is to be closed here.
        """
        self._callbacks.append(callback)

    def meet(self) -> None:
        """Waits until every process has called this as often, as it has to before the first collective of a program.

        Raises:
          EngineError: One has not within `wait_timeout_s`.
        """
        with self._moved:
            point = self._at[self.process_id] + 1
        self._arrive(point, "loading or compiling")

    def step(self) -> None:
        """Notes that this process's stream got on; after `wait_timeout_s` without the next step all processes end.

        Until the first call, and from `leave` on, there is no such limit.
        """
        with self._moved:
            self._at[self.process_id] = max(self._at[self.process_id], _STREAMING) + 1
            self._stepped_at, self._say_stream_at_s = time.monotonic(), self._wait.say_s

    def leave(self) -> None:
        """Ends this process's part: waits until all are done; shuts JAX's side down.

        A peer that is lost meanwhile ends this process as before.

        Raises:
          EngineError: One is not done within `wait_timeout_s`.
        """
        if self._over:
            return
        self._arrive(_DONE, "at work")
        if self._links:
            jax.distributed.shutdown()
        with self._lock:
            self._over = True
        for link in self._links.values():
            link.send(kind="bye")
            link.finish()
        if self._relay:
            self._relay.close()

    def fail(self, reason: str, exit_code: int = EXIT_LOST) -> None:
        """Tells the others that this process stops because of `reason`, one line; they end with it.

        When this process ends, it does so with `exit_code` and without JAX's shutdown, which would wait for
        them.
        """
        global _exit_code
        with self._lock:
            if self._over:
                return
            self._over = True
        if self._links:
            _exit_code = exit_code
        for link in self._links.values():
            link.send(kind="failed", text=reason)
            link.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.leave()
            except BaseException as e:  # also Ctrl-C while it waits
                self.fail(_reason(e), _code(e))
                raise
            return
        # A collective fails in the moment a peer dies. Then the watcher ends this process, with the reason.
        if self._links and isinstance(error, Exception) and _may_come_from_a_peer(error):
            time.sleep(VERDICT_S)
        self.fail(_reason(error), _code(error))

    # --- the watcher

    def _start(self) -> None:
        for process, link in self._links.items():
            threading.Thread(target=self._watch, args=(process, link), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._over:
            self._report()
            self._check_stream()
            time.sleep(self._peer_timeout_s / BEATS_PER_TIMEOUT)

    def _report(self) -> None:
        """Tells the others how far this process is, and process 0, whom alone all hear, how far every process is."""
        with self._moved:
            at = [(p, n) for p, n in self._at.items() if p == self.process_id or not self.process_id]
        for link in self._links.values():
            link.send(kind="beat", at=at)

    def _note(self, at: Iterable[tuple[int, int]]) -> None:
        """Takes in how far others are; process 0 passes it on."""
        with self._moved:
            for process, n in at:  # two threads may have sent theirs in either order
                self._at[process] = max(self._at[process], n)
            self._moved.notify_all()
        if self.process_id == 0:
            self._report()

    def _arrive(self, point: int, doing: str) -> None:
        """Notes that this process is at a point, and waits for those who are still `doing` what comes before it."""
        with self._moved:
            self._at[self.process_id] = point
        self._report()
        if not self._links:
            return

        def behind() -> str:
            with self._moved:
                return self._names(p for p, at in self._at.items() if at < point)

        with self._wait.told(lambda: f"{behind()}: still {doing}"), self._moved:
            all_here = self._moved.wait_for(lambda: min(self._at.values()) >= point, self._wait.timeout_s)
        if not all_here:
            raise EngineError(
                f"gave up after {self._wait.timeout_s:g} s waiting for {behind()}: still {doing}; look at its output"
            )

    def _check_stream(self) -> None:
        """Tells of a stream that does not get on, and ends it after `wait_timeout_s`."""
        with self._moved:
            own, idle_s = self._at[self.process_id], time.monotonic() - self._stepped_at
            if not _STREAMING < own < _DONE or idle_s < min(self._say_stream_at_s, self._wait.timeout_s):
                return
            self._say_stream_at_s = 2 * max(idle_s, self._say_stream_at_s)
            behind = self._names(p for p, at in self._at.items() if at < own)
            ahead = self._names(p for p, at in self._at.items() if at > own)
        if behind:
            what = f"{behind}: behind in the stream"
        elif ahead:
            what = f"the next step of this process: behind {ahead} in the stream"
        else:
            what = "the next step of the stream: no process is behind"
        if idle_s < self._wait.timeout_s or (ahead and not behind):  # those ahead will say when it is enough
            self._wait.tell(what, idle_s)
            return
        text = f"gave up after {self._wait.timeout_s:g} s waiting for {what}"
        self._lost(text, is_own=True)

    def _names(self, processes: Iterable[int]) -> str:
        return ", ".join(f"process {p} ({self.hosts[p]})" for p in processes)

    def _watch(self, process: int, link: _Link) -> None:
        who = self._names([process])
        while True:
            try:
                message = link.receive(self._peer_timeout_s)
            except TimeoutError:
                seconds = f"{self._peer_timeout_s:g} s"
                self._lost(f"{who} has not answered for {seconds}: it is stopped, or the network is down")
                return
            match message:
                case None:
                    if process not in self._gone:
                        self._lost(f"{who} has died; its own output, or its host's log, says why")
                    return
                case {"kind": "failed", "text": str(text)}:
                    self._lost(f"{who} stopped: {text}")
                case {"kind": "lost", "text": str(text)}:
                    self._lost(text)
                case {"kind": "beat", "at": [*at]}:
                    self._note((p, n) for p, n in at)
                case {"kind": "bye"}:
                    self._gone.add(process)

    def _lost(self, text: str, is_own: bool = False) -> None:
        """Ends this process; `is_own` says that the reason is its own, and not what another process told it."""
        with self._lock:
            if self._over:
                return
            self._over = True  # before the others hear of it, as they tell everybody
        for link in self._links.values():
            if self.process_id == 0:
                link.send(kind="lost", text=text)
            elif is_own:
                link.send(kind="failed", text=text)
        guard = threading.Timer(CLEANUP_S, _end, (text,))
        guard.daemon = True
        guard.start()
        for callback in reversed(self._callbacks):
            with contextlib.suppress(Exception):
                callback()
        _end(text)


def _end(text: str) -> NoReturn:
    # Not through sys.stderr: the main thread may hold its lock while it hangs.
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
    os._exit(EXIT_LOST)


@atexit.register  # after `import jax`: runs before JAX's own handler
def _end_without_jax() -> None:
    if _exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_exit_code)


def _may_come_from_a_peer(error: Exception) -> bool:
    return isinstance(error, EngineError) or not isinstance(error, Svd2Error)


def _reason(error: BaseException) -> str:
    match error:
        case KeyboardInterrupt():
            return "it was interrupted"
        case Svd2Error():
            return _first_line(error)
        case _:
            return f"{type(error).__name__}: {_first_line(error)}"


def _code(error: BaseException) -> int:
    match error:
        case Svd2Error():
            return EXIT_LOST
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED
        case SystemExit(code=None):
            return 0
        case SystemExit(code=int(code)):
            return code
        case _:
            return EXIT_FAILED


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- who and where


def _place(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> tuple[tuple[str, int], int, int, int | None] | None:
    """Returns ((host, port), process, processes, local id or None), or None for a process alone."""
    if num_processes is not None and num_processes < 1:
        raise ConfigError(f"--num-processes must be at least 1, got {num_processes}")
    if num_processes == 1 and process_id in (None, 0):
        return None
    local_id = None
    if None in (coordinator, process_id, num_processes):
        found = _scheduler()
        if found is not None:
            coordinator = found[0] if coordinator is None else coordinator
            process_id = found[1] if process_id is None else process_id
            num_processes = found[2] if num_processes is None else num_processes
            local_id = found[3]
    if coordinator is None and process_id is None and num_processes is None:
        return None
    values = {
        "--coordinator HOST:PORT": coordinator,
        "--process-id I": process_id,
        "--num-processes N": num_processes,
    }
    missing = [name for name, value in values.items() if value is None]
    if coordinator is None or process_id is None or num_processes is None:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"several processes need {', '.join(values)}; {' and '.join(missing)} {verb} missing, "
            "and no SLURM or Open MPI is there to tell it"
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id must be 0 to {num_processes - 1} with --num-processes {num_processes}, got {process_id}"
        )
    if num_processes == 1:
        return None
    return _address(coordinator), process_id, num_processes, local_id


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--coordinator: expected HOST:PORT with a port of 1 to 65535, got {text!r}")
    return host, int(port)


def _scheduler() -> tuple[str, int, int, int | None] | None:
    """Returns (coordinator, process, processes, local id) as JAX reads them from SLURM or Open MPI, or None.

    These two are told by environment variables alone. JAX also asks Kubernetes and cloud services, where a
    single process would wait, warn or fail.
    """
    from jax._src.clusters.ompi_cluster import OmpiCluster
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for kind in (SlurmCluster, OmpiCluster):
        try:
            if kind.is_env_present():
                return (
                    kind.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT")),
                    kind.get_process_id(),
                    kind.get_process_count(),
                    kind.get_local_process_id(),
                )
        except (RuntimeError, ValueError, KeyError) as e:
            raise ConfigError(
                f"the environment of {kind.name} cannot be used ({_first_line(e)}); give --coordinator, "
                "--process-id and --num-processes, or --num-processes 1 to run alone"
            ) from e
    return None


# --- how they meet


def _await_peers(
    host: str, port: int, own: dict[str, Any], count: int, wait: _Wait
) -> tuple[dict[int, _Link], list[str]]:
    """Returns, at process 0, the connections to all others and the hosts of all."""
    deadline = time.monotonic() + wait.timeout_s
    links: dict[int, _Link] = {}
    hellos: dict[int, dict[str, Any]] = {0: own}

    def refuse(text: str, error: type[Svd2Error], *more: _Link) -> NoReturn:
        for link in (*links.values(), *more):
            link.send(kind="refused", text=text, config=error is ConfigError)
            link.finish()
        raise error(text)

    def missing() -> str:
        return _missing_text(set(range(count)) - set(hellos), count)

    with _listen(host, port) as listener, wait.told(lambda: f"{missing()} to start"):
        while len(hellos) < count:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                link = _Link(listener.accept()[0])
            except TimeoutError:
                text = f"{missing()} did not start within {wait.timeout_s:g} s; {_START_ALL}"
                refuse(text, EngineError)
            hello = link.greeted()
            if hello is None:
                link.close()  # a port scanner, or a process that is gone again
                continue
            process = hello["process"]
            for name, value in own["same"].items():
                if (theirs := hello["same"].get(name)) != value:
                    here, there = _name(hellos[0]), _name(hello)
                    text = f"{there} was started with {name} {theirs}, {here} with {value}"
                    refuse(f"{text}; start the same on every host", ConfigError, link)
            if process in links and links[process].ended():
                links.pop(process).close()
            elif process in hellos or not 0 < process < count:
                text = f"two processes have --process-id {process}: "
                text += " and ".join(f"{h['host']} pid {h['pid']}" for h in (hellos.get(process, own), hello))
                refuse(f"{text}; each needs its own", ConfigError, link)
            links[process], hellos[process] = link, hello
    return links, [hellos[i]["host"] for i in range(count)]


def _missing_text(missing: set[int], count: int) -> str:
    names = ", ".join(map(str, sorted(missing)))
    noun = "process" if len(missing) == 1 else "processes"
    return f"{noun} {names} (of {count})"


def _others(count: int) -> str:
    return "1 other process" if count == 2 else f"{count - 1} other processes"


def _name(hello: Mapping[str, Any]) -> str:
    return f"process {hello['process']} ({hello['host']})"


def _await_welcome(host: str, port: int, own: dict[str, Any], wait: _Wait) -> tuple[_Link, dict[str, Any]]:
    """Returns the connection to process 0 and what it says when all have arrived."""
    deadline = time.monotonic() + wait.timeout_s
    why = "no answer"
    with wait.told(lambda: f"process 0 at {host}:{port}"):
        while True:
            try:
                sock = socket.create_connection((host, port), max(deadline - time.monotonic(), 1e-3))
                break
            except OSError as e:
                why = e.strerror or str(e) or why
            if time.monotonic() + RETRY_S >= deadline:
                raise EngineError(
                    f"process 0 at {host}:{port} was not there within {wait.timeout_s:g} s ({why}); {_START_ALL}"
                )
            time.sleep(RETRY_S)
    link = _Link(sock)
    link.send(**own)
    with wait.told(lambda: "the others to start; process 0 says which"):
        try:  # process 0 may have been started at the last moment; then its clock says when to give up
            message = link.receive(
                wait.timeout_s + HELLO_TIMEOUT_S * (int(own["same"]["--num-processes"]) + 1)
            )
        except TimeoutError:
            message = None
    match message:
        case {"kind": "welcome"}:
            return link, message
        case {"kind": "refused", "text": str(text), "config": bool(config)}:
            raise (ConfigError if config else EngineError)(text)
        case _:
            raise EngineError(
                f"process 0 at {host}:{port} ended, or is no svd2 process, before all {own['same']['--num-processes']} "
                "had started; look for errors there"
            )


def _listen(host: str, port: int) -> socket.socket:
    # The name may stand for another address here than elsewhere (Debian: 127.0.1.1), so all are listened on.
    try:
        if host in _LOOPBACK:
            family = socket.AF_INET6 if host == "::1" else socket.AF_INET
            return socket.create_server(("::1" if host == "::1" else "127.0.0.1", port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as e:
        why = e.strerror or str(e)
        raise EngineError(
            f"port {port} cannot be used on this host ({why}); choose another --coordinator, unless another process "
            "was given --process-id 0 as well"
        ) from e


def _late_text(host: str) -> str:
    return (
        f"jax.distributed did not start within {START_TIMEOUT_S:g} s; is there a firewall before {host}? JAX uses free "
        "ports besides the coordinator's"
    )


def _let_loopback_pass_proxies() -> None:
    """Keeps gRPC from sending JAX's messages, all to this host, to a web proxy, where they would be lost."""
    excepted = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy") or ""
    os.environ[_NO_PROXY] = ",".join(filter(None, (excepted, "127.0.0.1", "::1")))
    jax.config.update("jax_check_proxy_envs", False)


def _reserve_port() -> socket.socket:
    """Returns a bound socket whose port nobody else gets, and that gRPC can share as it does not listen."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("", 0))
    return sock


class _Link:
    """One connection that carries lines of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._lines = sock.makefile("rb")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; that the other side is gone is left to `receive` to notice."""
        with self._sending, contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Returns the next message, or None when the connection has ended; raises TimeoutError."""
        try:
            self._sock.settimeout(timeout_s)
            line = self._lines.readline(_MAX_LINE)
            message = json.loads(line) if line.endswith(b"\n") else None
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def greeted(self) -> dict[str, Any] | None:
        """Returns the first message if it is from a process of ours."""
        with contextlib.suppress(TimeoutError):
            match self.receive(HELLO_TIMEOUT_S):
                case {
                    "greeting": str(greeting),
                    "process": int(),
                    "host": str(),
                    "pid": int(),
                    "same": dict(),
                } as m:
                    return m if greeting == _GREETING else None
        return None

    def ended(self) -> bool:
        """Whether the other side has closed the connection."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def finish(self) -> None:
        """Nothing more will be sent; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


class _Relay:
    """Joins a port of this host to process 0's JAX service; JAX's side stays open when the other one ends."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = True
        self._kept: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._kept:
            sock.close()

    def _accept(self) -> None:
        while self._open:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            self._kept.append(near)
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        while self._open:
            try:
                far = socket.create_connection(self._target, PEER_TIMEOUT_S)
                break
            except OSError:
                time.sleep(RETRY_S)  # the service is not up yet, or gone; the watcher knows
        else:
            return
        self._kept.append(far)
        far.settimeout(None)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._copy, args=(near, far, True), daemon=True).start()
        self._copy(far, near, False)

    def _copy(self, source: socket.socket, sink: socket.socket, pass_end_on: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            if pass_end_on:
                sink.shutdown(socket.SHUT_WR)
