"""A Ray cluster of several nodes on this machine, each a process tree of its own that can be stopped like a machine."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import descendants, titled
from tests.waiting import wait_for

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Node:
    """`ray start --block` and what it started."""

    process: subprocess.Popen
    cpus: float
    log: Path
    gone: bool = False

    def pids(self, *marks: str) -> list[int]:
        return titled(self.process.pid, *marks)

    def wait_until_up(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, f"the node ended: {self.log.read_text()[-2000:]}"
            return "Ray runtime started" in self.log.read_text()

        wait_for("a node to come up", up, signs=[self.log], told=lambda: self.log.read_text()[-2000:])

    def lose(self) -> None:
        """As a machine that is switched off."""
        self.gone = True
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    folder: Path
    environment: dict[str, str]
    port: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def temporary(self) -> Path:
        """The temporary directory of all its processes."""
        return self.folder / "t"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, cpus: float, command: Sequence[str] = (RAY, "start", "--block"), labels: str = "") -> Node:
        """Start a node, the first one as the head, and wait until it is up."""
        options = {"num-cpus": f"{cpus:g}", "node-ip-address": "127.0.0.1", "object-store-memory": "200000000"}
        options |= {"labels": labels} if labels else {}
        options |= {"min-worker-port": "0", "max-worker-port": "0", "dashboard-agent-listen-port": "0"}
        if self.nodes:
            options["address"] = self.address
        else:
            options |= {"port": str(self.port), "dashboard-port": str(free_port()), "temp-dir": str(self.folder)}
            options |= {"include-dashboard": "true", "dashboard-host": "127.0.0.1"}
            options |= {"ray-client-server-port": str(free_port())}
        given = [f"--{name}={value}" for name, value in options.items()]
        kind = [] if self.nodes else ["--head"]
        whole = [*command, "--disable-usage-stats", *kind, *given]
        log = self.folder / f"node-{len(self.nodes)}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                whole, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        node = Node(process, cpus, log)
        self.nodes.append(node)
        node.wait_until_up()
        return node

    def pids(self, *marks: str) -> list[int]:
        return sorted(pid for node in self.nodes if not node.gone for pid in node.pids(*marks))

    def state(self) -> str:
        """What Ray says of its resources, placement groups and actors, for the message of a test that failed."""
        environment = self.environment | {"RAY_ADDRESS": self.address}
        said = []
        for command in (["status", "-v"], ["list", "placement-groups", "--detail"], ["list", "actors"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    [RAY, *command], env=environment, capture_output=True, text=True, timeout=60, check=False
                )
                said.append(f"$ ray {' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-500:]}")
        return "\n".join(said)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if not node.gone:
                node.lose()


@contextlib.contextmanager
def ray_nodes(*cpus: float, **environment: str) -> Iterator[Cluster]:
    """A cluster of nodes with so many CPUs each; the first is the head."""
    # Sockets have paths of at most 107 characters, so no test's own folder will do.
    with tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as folder:
        # A token of its own: whether the user has one in the home directory makes no difference.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        cluster = Cluster(Path(folder), {**os.environ, **environment})
        cluster.temporary.mkdir()  # what processes leave there lies in the folder, too
        cluster.environment["TMPDIR"] = str(cluster.temporary)
        cluster.environment.pop("RAY_ADDRESS", None)
        try:
            # One after the other: two that start at the same moment choose the same name for their sockets.
            for count in cpus:
                cluster.add(count)
            yield cluster
        finally:
            cluster.stop()
