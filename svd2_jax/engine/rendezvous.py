"""How the processes of one pipeline find each other: who they are, and one TCP connection from each to process 0.

Messages are lines of JSON and carry no secrets; like JAX's own service they are neither signed nor encrypted, so the
coordinator's port belongs on a network that is trusted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from svd2_jax.errors import ConfigError, EngineError, Svd2Error

TICK_S = 0.1
"""How often a wait looks whether it is over, and a process tells the others how far it is."""
IO_TIMEOUT_S = 2.0
"""How long one connection attempt may take, and a message until the other side's buffer has it."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_MAX_LINE = 1 << 16
_GREETING = "svd2 cluster 3"  # the version of these messages
_START_ALL = "start the command on every host, and look for errors there"


class Clock:
    """A wait that begins now. It is told of after `say_s` and then whenever it has lasted twice as long."""

    def __init__(self, say_s: float, say: Callable[[str], object], timeout_s: float) -> None:
        self.timeout_s, self._say_s, self._say = timeout_s, say_s, say
        self.restart()

    def restart(self) -> None:
        """Lets another wait begin now."""
        self._began, self._say_at_s = time.monotonic(), self._say_s

    def over(self, what: str) -> str | None:
        """Tells of the wait for `what` when that is due; returns what to say when it has lasted `timeout_s`."""
        waited_s = time.monotonic() - self._began
        if waited_s >= self.timeout_s:
            return f"gave up after {self.timeout_s:g} s waiting for {what}"
        if waited_s >= self._say_at_s:
            self._say(f"waiting for {what} ({self._say_at_s:g} s; gives up after {self.timeout_s:g} s)")
            self._say_at_s *= 2
        return None


class Link:
    """A connection that carries lines of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._rest = b""
        self.heard_at = time.monotonic()

    def send(self, **message: Any) -> None:
        """Sends a message; that the other side is gone is left to `receive` to notice."""
        self._sock.settimeout(IO_TIMEOUT_S)
        with contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that have come since, without waiting; None when the connection has ended."""
        self._sock.settimeout(0)
        try:
            data = self._sock.recv(_MAX_LINE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            return None
        self.heard_at = time.monotonic()
        is_ours = data and len(self._rest) < _MAX_LINE and all(isinstance(m, dict) for m in messages)
        return messages if is_ours else None

    def close(self) -> None:
        """Ends the connection; what was sent still arrives."""
        self._sock.close()


# --- who and where


def place(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> tuple[tuple[str, int], int, int, int | None] | None:
    """Returns ((host, port), process, processes, local id or None), or None for a process alone."""
    if num_processes is not None and num_processes < 1:
        raise ConfigError(f"--num-processes must be at least 1, got {num_processes}")
    if num_processes == 1 and process_id in (None, 0):
        return None
    local_id = None
    if None in (coordinator, process_id, num_processes) and (found := _scheduler()) is not None:
        coordinator = found[0] if coordinator is None else coordinator
        process_id = found[1] if process_id is None else process_id
        num_processes = found[2] if num_processes is None else num_processes
        local_id = found[3]
    if coordinator is None and process_id is None and num_processes is None:
        return None
    if coordinator is None or process_id is None or num_processes is None:
        names = ("--coordinator HOST:PORT", "--process-id I", "--num-processes N")
        values = (coordinator, process_id, num_processes)
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        raise ConfigError(
            f"several processes need {', '.join(names)}; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing, and no SLURM or Open MPI is there to tell it"
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id must be 0 to {num_processes - 1} with --num-processes {num_processes}, got {process_id}"
        )
    return None if num_processes == 1 else (_address(coordinator), process_id, num_processes, local_id)


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
                f"the environment of {kind.name} cannot be used ({first_line(e)}); give --coordinator, "
                "--process-id and --num-processes, or --num-processes 1 to run alone"
            ) from e
    return None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def introduction(process: int, same: Mapping[str, str]) -> dict[str, Any]:
    """Returns how a process introduces itself; `same` must agree on all."""
    host = socket.gethostname()
    return {"greeting": _GREETING, "process": process, "host": host, "pid": os.getpid(), "same": dict(same)}


def _is_hello(message: Mapping[str, Any]) -> bool:
    match message:
        case {"greeting": str(greeting), "process": int(), "host": str(), "pid": int(), "same": dict()}:
            return greeting == _GREETING
    return False


# --- how they meet


def await_peers(
    host: str, port: int, own: dict[str, Any], count: int, clock: Clock
) -> tuple[dict[int, Link], list[str]]:
    """Returns, at process 0, the connections to all others and the hosts of all; the port is free again.

    Raises:
      ConfigError: The settings of one differ, or two have the same number; all hear of it.
      EngineError: The port is taken, or one did not start in time; all that did hear of it.
    """
    callers: dict[Link, dict[str, Any]] = {}  # each with how it has introduced itself, as soon as it has

    def refuse(error: type[Svd2Error], text: str) -> NoReturn:
        for link in callers:
            link.send(refused=text, config=error is ConfigError)
            link.close()
        raise error(text)

    def check(hello: dict[str, Any]) -> None:
        for name, value in own["same"].items():
            if (theirs := hello["same"].get(name)) != value:
                there, here = (f"process {h['process']} ({h['host']})" for h in (hello, own))
                text = f"{there} was started with {name} {theirs}, {here} with {value}"
                refuse(ConfigError, f"{text}; start the same on every host")
        for other in (own, *filter(None, callers.values())):
            if other["process"] == hello["process"]:
                both = " and ".join(f"{h['host']} pid {h['pid']}" for h in (other, hello))
                text = f"two processes have --process-id {hello['process']}: {both}; each needs its own"
                refuse(ConfigError, text)

    with _listen(host, port) as listener:
        listener.settimeout(TICK_S)
        while missing := set(range(count)) - {h["process"] for h in (own, *callers.values()) if h}:
            who = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))} (of {count})"
            if clock.over(f"{who} to start"):
                refuse(EngineError, f"{who} did not start within {clock.timeout_s:g} s; {_START_ALL}")
            with contextlib.suppress(TimeoutError):
                callers[Link(listener.accept()[0])] = {}
            for link, known in list(callers.items()):
                match link.receive():
                    case []:  # nothing yet
                        pass
                    case [hello] if _is_hello(hello) and not known:
                        check(hello)
                        callers[link] = hello
                    case _:  # a port scanner, or a process that is gone again
                        del callers[link]
                        link.close()
    links, hosts = {}, [own["host"]] * count
    for link, hello in callers.items():
        if hello:
            links[hello["process"]], hosts[hello["process"]] = link, hello["host"]
        else:
            link.close()
    return links, hosts


def await_welcome(
    host: str, port: int, own: dict[str, Any], count: int, clock: Clock
) -> tuple[Link, dict[str, Any]]:
    """Returns the connection to process 0 and what it says when all have arrived.

    Raises:
      ConfigError: Process 0 refuses a setting.
      EngineError: Process 0 is not there in time, or ends.
    """
    link = Link(_connected(host, port, clock))
    link.send(**own)
    clock.restart()
    while (messages := link.receive()) == []:
        if clock.over("the others to start; process 0 says which"):
            time.sleep(
                IO_TIMEOUT_S
            )  # process 0 may have been started at the last moment, and has the last word
            messages = link.receive()
            break
        time.sleep(TICK_S)
    match messages:
        case [{"hosts": list()} as welcome, *_]:
            return link, welcome
        case [{"refused": str(text), "config": bool(config)}]:
            link.close()
            raise (ConfigError if config else EngineError)(text)
    link.close()
    raise EngineError(
        f"process 0 at {host}:{port} ended, or is no svd2 process, before all {count} had started; "
        "look for errors there"
    )


def _connected(host: str, port: int, clock: Clock | None = None) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), IO_TIMEOUT_S)
        except OSError as e:
            if clock and clock.over(f"process 0 at {host}:{port}"):
                raise EngineError(
                    f"process 0 at {host}:{port} was not there within {clock.timeout_s:g} s "
                    f"({e.strerror or e}); {_START_ALL}"
                ) from None
        time.sleep(TICK_S)


def _listen(host: str, port: int) -> socket.socket:
    # The name may stand for another address here than elsewhere (Debian: 127.0.1.1), so all are listened on.
    here = host if host in LOOPBACK else ""
    both = not here and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or here == "::1" else socket.AF_INET
    try:
        return socket.create_server((here, port), family=family, dualstack_ipv6=both)
    except OSError as e:
        raise EngineError(
            f"port {port} cannot be used on this host ({e.strerror or e}); choose another --coordinator, "
            "unless another process was given --process-id 0 as well"
        ) from e


def relay(host: str, port: int) -> int:
    """Returns a port of this host that leads to another one's, and stays open when the other end closes."""
    listener = socket.create_server(("127.0.0.1", 0))
    near_ends: list[socket.socket] = []  # held here, as they close when nobody holds them

    def copy(source: socket.socket, sink: socket.socket, then: Callable[[], object]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            then()

    def serve() -> None:
        while True:
            near = listener.accept()[0]
            far = _connected(host, port)  # waits where the service is not up yet
            far.settimeout(None)
            near_ends.append(near)
            pass_end_on = functools.partial(
                far.shutdown, socket.SHUT_WR
            )  # else the service waits for this process
            for source, sink, then in ((near, far, pass_end_on), (far, near, far.close)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=copy, args=(source, sink, then), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]
