"""Ray clusters of a test's own: nodes as process trees on this machine, with a token, each stopped like a machine."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raybert.cluster.connection import LOCAL
from tests import waiting
from tests.processes import descendants, start_node, titled

RAY = str(Path(sys.executable).with_name("ray"))
LOOPBACK = "127.0.0.1"
START = (RAY, "start", "--block")
LEAVING = (sys.executable, "-m", "raybert.node")  # a node that drains itself, as the cluster files start them


@dataclass
class Node:
    """`ray start --block` and what it started."""

    process: subprocess.Popen
    cpus: float
    log: Path
    gone: bool = False

    def pids(self, *marks: str) -> list[int]:
        return titled(self.process.pid, *marks)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def lose(self) -> None:
        """As a machine that is switched off. (`ray stop` would end every Ray on the machine.)"""
        self.gone = True
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Cluster:
    """A head, which is the first node that is added, and nodes that join it.

    Attributes:
        environment: what a client needs to reach it: address and token.
        folder: where its nodes keep their files; sockets have paths of at most 107 characters.
        temporary: the temporary directory of all its processes.
    """

    def __init__(self, folder: Path, *, port: int | None = None, environment: Mapping[str, str] | None = None) -> None:
        found, dashboard = free_ports(2)
        self.folder, self.temporary = folder, folder / "t"
        self.temporary.mkdir()
        self.port, self._dashboard = port or found, dashboard
        self._of_nodes = {
            # What the shared Ray is told as a local one holds for no cluster.
            **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *LOCAL)},
            # Jobs' entry points say `python`.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TMPDIR": str(self.temporary),
            # A token of its own: whether the user has one in the home directory makes no difference.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            **(environment or {}),
        }
        self.environment = {**self._of_nodes, "RAY_ADDRESS": self.address}
        self.nodes: list[Node] = []

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://{LOOPBACK}:{self._dashboard}"

    def add(self, cpus: float, command: Sequence[str] = START, labels: str = "", options: Sequence[str] = ()) -> Node:
        """Start a node, the first one as the head, and wait until it is up."""
        (client,) = free_ports(1)
        flags = [f"--num-cpus={cpus:g}", f"--node-ip-address={LOOPBACK}", "--object-store-memory=200000000"]
        flags += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        # Two nodes with one directory would unpack a job's files over each other's.
        place = f"node-{len(self.nodes)}" if self.nodes else "ray"
        flags += [f"--temp-dir={self.folder}/{place}", *([f"--labels={labels}"] if labels else []), *options]
        if self.nodes:
            flags += [f"--address={self.address}"]
        else:
            flags += ["--head", f"--port={self.port}", f"--ray-client-server-port={client}"]
            flags += ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={self._dashboard}"]
        log = self.folder / f"node-{len(self.nodes)}.log"

        def start() -> subprocess.Popen:
            with open(log, "w") as file:
                return subprocess.Popen(
                    [*command, "--disable-usage-stats", *flags],
                    env=self._of_nodes,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

        def told() -> str:
            return log.read_text(errors="replace")[-2000:]

        def up() -> bool:
            return "Ray runtime started" in log.read_text(errors="replace")

        node = Node(start_node(start, up, signs=[log], told=told), cpus, log)
        self.nodes.append(node)
        return node

    def wait_for_jobs_api(self) -> None:
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/", headers=headers)
        head = self.nodes[0]

        def answers() -> bool:
            assert head.process.poll() is None, head.tail()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=60).close()
                return True
            return False

        waiting.wait_for("the Jobs API to answer", answers, signs=[head.log], told=head.tail)

    def run(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command against the cluster; `options` are those of `waiting.run`."""
        environment = self.environment | options.pop("env", {})
        return waiting.run(arguments, env=environment, **options)

    def pids(self, *marks: str) -> list[int]:
        return sorted(pid for node in self.nodes if not node.gone for pid in node.pids(*marks))

    def processes(self) -> list[psutil.Process]:
        """All processes of all its nodes."""
        found = []
        for node in self.nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(node.process.pid)
                found += [top, *top.children(recursive=True)]
        return found

    def state(self) -> str:
        """What Ray says of its resources, placement groups and actors, for the message of a test that failed."""
        said = []
        for command in (["status", "-v"], ["list", "placement-groups", "--detail"], ["list", "actors"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    [RAY, *command], env=self.environment, capture_output=True, text=True, timeout=60, check=False
                )
                said.append(f"$ ray {' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-500:]}")
        return "\n".join(said)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if not node.gone:
                node.lose()


@contextlib.contextmanager
def cluster(
    *cpus: float, port: int | None = None, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """A cluster of nodes with so many CPUs each; the first is the head, which `options` are for."""
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = Cluster(Path(folder), port=port, environment=environment)
        try:
            # One after the other: two that start at the same moment choose the same name for their sockets.
            for number, count in enumerate(cpus):
                started.add(count, options=() if number else options)
            yield started
        finally:
            started.stop()


@contextlib.contextmanager
def forwarded(port: int, target: int) -> Iterator[None]:
    """Connections to a port go to another one, as `kubectl port-forward` does it; at the end all of them are cut."""
    connections: list[socket.socket] = []
    server = socket.create_server((LOOPBACK, port), reuse_port=True)

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = [server.accept()[0], socket.create_connection((LOOPBACK, target))]
                connections.extend(ends)
                for source, sink in (ends, ends[::-1]):
                    threading.Thread(target=pass_on, args=(source, sink), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        for each in [server, *connections]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((LOOPBACK, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
