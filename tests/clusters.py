"""Ray clusters of a test's own: nodes as processes on this machine, with a token, ended by their process ids."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests import waiting

RAY = str(Path(sys.executable).with_name("ray"))
LOOPBACK = "127.0.0.1"
JOINED = "Ray runtime started"  # what `ray start` says when its node is up


class Cluster:
    """A head, and nodes that join it. `environment` is what a client needs to reach it: address and token."""

    def __init__(
        self,
        *,
        cpus: int,
        port: int | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # Sockets lie in it, and their paths may have about 100 characters.
        self.folder = tempfile.mkdtemp(prefix="rb-", dir="/tmp")
        found, dashboard, client = free_ports(3)
        self.port = port or found
        self.dashboard = f"http://{LOOPBACK}:{dashboard}"
        self._shared = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            # Jobs' entry points say `python`.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            **(environment or {}),
        }
        self.environment = {**self._shared, "RAY_ADDRESS": f"{LOOPBACK}:{self.port}"}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = open(os.path.join(self.folder, "ray-start.log"), "wb")  # noqa: SIM115 - open for the cluster's life
        self._start(
            *("--head", f"--port={self.port}", f"--node-ip-address={LOOPBACK}", f"--num-cpus={cpus}"),
            *("--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={self.folder}/ray", *options),
        )
        self._wait_for_jobs_api()

    def add_node(self, *, cpus: int, labels: str) -> None:
        """Add a worker node as the cluster files start one, and wait until it has joined."""
        before = self.log().count(JOINED)
        node = self._start(
            *(f"--address={LOOPBACK}:{self.port}", f"--node-ip-address={LOOPBACK}"),
            *(f"--num-cpus={cpus}", f"--labels={labels}"),
            # Two nodes with one directory would unpack a job's files over each other's.
            f"--temp-dir={self.folder}/node-{len(self._processes)}",
            command=(sys.executable, "-m", "raybert.node"),
        )

        def joined() -> bool:
            assert node.poll() is None, self.log()
            return self.log().count(JOINED) > before

        waiting.wait_for("a node to join", joined, signs=[self._log.name], told=self.log)

    def _start(self, *arguments: str, command: Sequence[str] = (RAY, "start", "--block")) -> "subprocess.Popen[bytes]":
        ports = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
        process = subprocess.Popen(
            [*command, "--disable-usage-stats", *ports, *arguments],
            env=self._shared,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._processes.append(process)
        return process

    def _wait_for_jobs_api(self) -> None:
        request = urllib.request.Request(
            f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        )

        def answers() -> bool:
            assert self._processes[0].poll() is None, self.log()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=60).close()
                return True
            return False

        waiting.wait_for("the Jobs API to answer", answers, signs=[self._log.name], told=self.log)

    def log(self) -> str:
        return Path(self.folder, "ray-start.log").read_text(errors="replace")

    def run(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command against the cluster; `options` are those of `waiting.run`."""
        environment = self.environment | options.pop("env", {})
        return waiting.run(arguments, env=environment, **options)

    def processes(self) -> list[psutil.Process]:
        """All processes of all its nodes."""
        found = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.pid)
                found += [top, *top.children(recursive=True)]
        return found

    def close(self) -> None:
        for process in reversed(self._processes):
            waiting.end_process(process)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(**options: Any) -> Iterator[Cluster]:
    started = Cluster(**options)
    try:
        yield started
    finally:
        started.close()


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
