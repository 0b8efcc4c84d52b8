"""Several processes that run one pipeline: how they meet, watch each other, and end together.

Every process calls `join` before JAX opens its devices:

    with cluster.join(args.coordinator, args.process_id, args.num_processes) as group:
        group.on_loss(writer.discard)
        ...  # load and compile
        group.meet()
        ...  # stream, and call group.step() whenever it gets on

A process that waits for a collective cannot be interrupted from Python, and gloo and NCCL wait without end for a peer
that is gone. JAX's own client notices it, but aborts the process: a page of C++ text and a core dump instead of one
line, and a half-written file stays. Its hook, `missed_heartbeat_callback`, fails with std::bad_cast for any Python
function, and `jax_enable_recoverability` does not keep it from aborting when process 0 is gone (jax 0.10.2). So:

- The processes meet over a TCP connection of their own, one from each to process 0 at the coordinator's address
  (rendezvous.py). When all are there, `jax.distributed` is started on the same port.
- A thread watches the connections: one closes at once when its process dies, and nothing comes through it while the
  process is stopped or cut off. The watcher tells the others, runs the callbacks of `on_loss`, prints one line and ends
  the process.
- JAX's heartbeats are made so rare that they do not speak first, and its client speaks through a relay in its own
  process, whose near end stays open when process 0 is gone.
- Every process says all the time how far it is, and process 0 tells all of it to all. So a process that waits says for
  whom, and gives up after a stated time.
- The processes meet once more before the first collective: gloo gives the last one 30 s to come there, and compiling
  may take one process longer than another.
- A process that fails tells the others why, and leaves without JAX's shutdown, which would wait for them.

Two peers that reach process 0 but not each other are not told apart from two that are slow.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

import jax

from svd2_jax.command import EXIT_FAILED, EXIT_INTERRUPTED
from svd2_jax.engine import rendezvous
from svd2_jax.engine.rendezvous import TICK_S, Clock, Link, first_line
from svd2_jax.errors import EngineError, Svd2Error

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
VERDICT_S = 2.0
"""How long an error that a lost peer may have caused waits for the watcher, who knows the reason."""
CLEANUP_S = 5.0
"""How long the callbacks of `on_loss` may take together, and the last message."""
EXIT_LOST = 2

_NO_PROXY = "no_grpc_proxy"  # gRPC reads it in this spelling
_NEVER_S = 10**6  # for JAX's own heartbeats: 11 days

# How far a process is. Each meeting counts one more than the one before, and each step of its stream likewise.
_STARTED, _STREAMING, _DONE = 0, 1 << 16, 1 << 62

_exit_code: int | None = None  # set by `Cluster.fail`


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    clock = functools.partial(Clock, say_s, say)
    found = rendezvous.place(coordinator, process_id, num_processes)
    if found is None:
        return Cluster(0, [socket.gethostname()], {}, peer_timeout_s, wait_timeout_s, clock)
    (host, port), me, count, local_id = found
    if jax.distributed.is_initialized():
        raise EngineError("this process is in a cluster already; expected one join per process")
    versions = {"svd2-jax": importlib.metadata.version("svd2-jax"), "jax": jax.__version__}
    own = rendezvous.introduction(me, {"--num-processes": str(count), **versions, **(same or {})})
    say(f"waiting for {count - 1} other process{'es' * (count > 2)} at {host}:{port}")
    if me == 0:
        links, hosts = rendezvous.await_peers(host, port, own, count, clock(timeout_s))
        for link in links.values():
            link.send(hosts=hosts, peer_timeout_s=peer_timeout_s)
    else:
        link, welcome = rendezvous.await_welcome(host, port, own, count, clock(timeout_s))
        links, hosts, peer_timeout_s = {0: link}, welcome["hosts"], float(welcome["peer_timeout_s"])
    cluster = Cluster(me, hosts, links, peer_timeout_s, wait_timeout_s, clock)
    with contextlib.ExitStack() as stack:
        stack.push(cluster)  # tells the others of an error
        cluster._start_jax(host, port, local_id)
        stack.pop_all()
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
        hosts: Iterable[str],
        links: dict[int, Link],
        peer_timeout_s: float,
        wait_timeout_s: float,
        clock: Callable[[float], Clock],
    ) -> None:
        self.process_id = process_id
        self.hosts = tuple(hosts)
        self.num_processes = len(self.hosts)
        self._links = links  # to all others at process 0, to process 0 elsewhere
        self._peer_timeout_s = peer_timeout_s
        self._wait_timeout_s = wait_timeout_s
        self._clock = clock
        self._callbacks: list[Callable[[], object]] = []
        self._at = dict.fromkeys(range(self.num_processes), _STARTED)  # how far each is known to be
        self._hang: Clock | None = None  # of a wait in which the main thread cannot look at a clock
        self._last: dict[str, object] | None = None  # message, when nothing that a peer does matters any more
        # The watcher alone sends and receives.
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if links:
            self._watcher.start()

    def _start_jax(self, host: str, port: int, local_id: int | None) -> None:
        here = "[::1]" if host == "::1" and self.process_id == 0 else "127.0.0.1"
        port_here = rendezvous.relay(host, port) if self.process_id else port
        # JAX gives each SLURM or Open MPI task one device of its host. One task per host takes all of them.
        is_alone_here = self.hosts.count(self.hosts[self.process_id]) == 1
        # All that gRPC sends goes to this host. A web proxy would not find it, and JAX would hang.
        os.environ[_NO_PROXY] = "127.0.0.1,::1"
        jax.config.update("jax_check_proxy_envs", False)
        jax.config.update("jax_enable_preemption_service", False)  # it would ignore SIGTERM
        self._hang = self._clock(START_TIMEOUT_S)  # JAX would wait on, for 300 s, and then abort
        try:
            jax.distributed.initialize(
                f"{here}:{port_here}",
                self.num_processes,
                self.process_id,
                local_device_ids=None if is_alone_here else local_id,
                cluster_detection_method="deactivate",
                coordinator_bind_address=f"{here if host in rendezvous.LOOPBACK else '[::]'}:{port}",
                heartbeat_timeout_seconds=_NEVER_S,
            )
        except Exception as e:
            raise EngineError(f"jax.distributed could not be started ({first_line(e)})") from e
        finally:
            self._hang = None

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
        self._arrive(self._at[self.process_id] + 1, "loading or compiling")

    def step(self) -> None:
        """Notes that this process's stream got on; after `wait_timeout_s` without the next step all processes end.

        Until the first call, and from `leave` on, there is no such limit.
        """
        self._at[self.process_id] = max(self._at[self.process_id], _STREAMING) + 1
        if self._hang is None:
            self._hang = self._clock(self._wait_timeout_s)
        self._hang.restart()

    def leave(self) -> None:
        """Ends this process's part: waits until all are done; shuts JAX's side down.

        A peer that is lost meanwhile ends this process as before.

        Raises:
          EngineError: One is not done within `wait_timeout_s`.
        """
        self._hang = None
        if self._last is None and self.num_processes > 1:
            self._arrive(_DONE, "at work")
            jax.distributed.shutdown()
            self._end_watch(bye=True)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process stops because of `error`; they end with its first line.

        This process then ends, when it does, without JAX's shutdown, which would wait for them.
        """
        global _exit_code
        if self._last is None and self.num_processes > 1:
            reason, _exit_code = _reason_and_code(error)
            self._end_watch(end=self._stopped(reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.leave()
            except BaseException as e:  # also Ctrl-C while it waits
                self.fail(e)
                raise
            return
        # A collective fails in the moment a peer dies. Then the watcher ends this process, with the reason.
        is_own = isinstance(error, Svd2Error) and not isinstance(error, EngineError)
        if self.num_processes > 1 and isinstance(error, Exception) and not is_own:
            time.sleep(VERDICT_S)
        self.fail(error)

    def _arrive(self, point: int, doing: str) -> None:
        """Notes that this process is at a point, and waits for those who are still `doing` what comes before it."""
        self._at[self.process_id] = point
        clock = self._clock(self._wait_timeout_s)
        while behind := [p for p, at in self._at.items() if at < point]:
            if text := clock.over(f"{self._names(behind)}: still {doing}"):
                raise EngineError(f"{text}; look at its output")
            time.sleep(TICK_S)

    def _names(self, processes: Iterable[int]) -> str:
        return ", ".join(f"process {p} ({self.hosts[p]})" for p in processes)

    def _stopped(self, reason: str) -> str:
        return f"{self._names([self.process_id])} stopped: {reason}"

    # --- the watcher

    def _watch(self) -> None:
        for link in self._links.values():
            link.heard_at = time.monotonic()  # not when it arrived, which may be long ago
        while self._last is None:
            for process, link in list(self._links.items()):
                self._hear(process, link)
            # Process 0, whom alone all hear, tells how far every process is.
            self._tell(at=[(p, n) for p, n in self._at.items() if self.process_id in (0, p)])
            self._check_hang()
            time.sleep(TICK_S)
        self._tell(**self._last)
        for link in self._links.values():
            link.close()

    def _hear(self, process: int, link: Link) -> None:
        who, messages = self._names([process]), link.receive()
        if messages is None:
            self._lost(f"{who} has died; its own output, or its host's log, says why")
        elif time.monotonic() - link.heard_at > self._peer_timeout_s:
            silence = f"has not answered for {self._peer_timeout_s:g} s"
            self._lost(f"{who} {silence}: it is stopped, or the network is down")
        for message in messages or ():
            match message:
                case {"end": str(text)}:
                    self._lost(text)
                case {"at": [*at]}:
                    self._at.update((p, n) for p, n in at if p != self.process_id)
                case {"bye": True}:
                    del self._links[process]

    def _tell(self, **message: object) -> None:
        for link in self._links.values():
            link.send(**message)

    def _check_hang(self) -> None:
        """Tells of a start of JAX or a stream that does not get on, and ends it when it has taken too long."""
        clock, own = self._hang, self._at[self.process_id]
        if clock is None:
            return
        behind = self._names(p for p, at in self._at.items() if at < own)
        ahead = self._names(p for p, at in self._at.items() if at > own)
        if own == _STARTED:
            what, ahead = "jax.distributed to start", ""
        elif behind:
            what = f"{behind}: behind in the stream"
        elif ahead:
            what = f"the next step of this process: behind {ahead} in the stream"
        else:
            what = "the next step of the stream: no process is behind"
        text = clock.over(what)
        if text and (behind or not ahead):  # those ahead will say when it is enough
            self._lost(text, self._stopped(text))

    def _end_watch(self, **last: object) -> None:
        self._last = last
        self._watcher.join(CLEANUP_S)

    def _lost(self, text: str, told: str | None = None) -> None:
        """Ends this process with a line, and the others with it or with what they are `told`."""
        if self._last is not None:
            return  # it ends by itself
        self._tell(end=told or text)
        clean_up = threading.Thread(target=self._clean_up, daemon=True)
        clean_up.start()
        clean_up.join(CLEANUP_S)
        # Not through sys.stderr: the main thread may hold its lock while it hangs.
        with contextlib.suppress(OSError):
            os.write(2, f"error: {text}\n".encode())
        os._exit(EXIT_LOST)

    def _clean_up(self) -> None:
        for callback in reversed(self._callbacks):
            with contextlib.suppress(Exception):
                callback()


@atexit.register  # after `import jax`: runs before JAX's own handler
def _end_without_jax() -> None:
    if _exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_exit_code)


def _reason_and_code(error: BaseException) -> tuple[str, int]:
    match error:
        case KeyboardInterrupt():
            return "it was interrupted", EXIT_INTERRUPTED
        case Svd2Error():
            return first_line(error), EXIT_LOST
        case SystemExit(code=int() | None as code):
            return f"SystemExit: {code}", code or 0
        case _:
            return f"{type(error).__name__}: {first_line(error)}", EXIT_FAILED
