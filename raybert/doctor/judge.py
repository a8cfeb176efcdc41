"""What is made of the facts about a cluster: a line says that something is in order, or what is wrong and what to do.

Pure functions, without Ray; `raybert.doctor.examine` finds the facts out.
"""

import ipaddress
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from raybert.cluster import Shares, plan_shares
from raybert.config import Config
from raybert.errors import InputError

PACKAGES = ("ray", "torch", "raybert")
# A clock that is further off than this puts log lines and waiting times out of order; Google refuses tokens that are
# minutes off.
MAX_SKEW = 2.0


@dataclass(frozen=True)
class Line:
    """One check. `remedy` says what to do, and is empty if the check passed."""

    subject: str
    detail: str
    remedy: str = ""
    known: bool = True  # False for what could not be looked at from here

    @property
    def verdict(self) -> str:
        return "WRONG" if self.remedy else "ok" if self.known else "not known"


@dataclass(frozen=True)
class NodeFacts:
    """What a node reports about itself."""

    name: str  # its address
    versions: Mapping[str, str]  # python, PACKAGES and the digest of raybert's own code
    cpus: float
    gpus: float
    object_store: float  # bytes that Ray wants for objects
    shared_memory: int  # bytes of /dev/shm; 0 where there is none
    threads: int  # OMP_NUM_THREADS of a worker
    skew: float = 0.0  # seconds that its clock is ahead of the driver's
    skew_error: float = 0.0  # seconds, half of the time that asking took
    storage_faults: Mapping[str, str] = field(default_factory=dict)  # subject -> sentence


def nodes(nodes: Sequence[NodeFacts], silent: Mapping[str, str], most_cpus: float = 0.0) -> Line:
    """
    Args:
        silent: nodes that did not answer, and why.
        most_cpus: what the autoscaler may grow the cluster to.
    """
    if silent:
        name, reason = next(iter(silent.items()))
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        remedy = "install raybert and its packages there, or submit a job with --working-dir; look at the node's logs"
        return Line("nodes", f"{name}{more} ran no task: {reason}", remedy)
    room = most_cpus - sum(node.cpus for node in nodes)
    absent = ""
    if room > 1e-6:
        absent = f"; nodes with {room:g} more CPUs may be added by autoscaling and cannot be checked yet"
    return Line("nodes", f"{len(nodes)} of {len(nodes)} ran a task{absent}")


def versions(nodes: Sequence[NodeFacts]) -> Iterator[Line]:
    """One line for each of python, ray, torch and raybert: are they the same everywhere?"""
    for package in ("python", *PACKAGES):
        where = defaultdict(list)
        for node in nodes:
            where[node.versions[package]].append(node.name)
        if len(where) == 1:
            yield Line(package, f"{next(iter(where))} on every node")
            continue
        found = "; ".join(f"{found} on {_some(names)}" for found, names in sorted(where.items()))
        yield Line(
            package, found, f"use one image, or one set of pinned versions, so that {package} is the same everywhere"
        )


def clocks(nodes: Sequence[NodeFacts]) -> Line:
    worst = max(nodes, key=lambda node: abs(node.skew) - node.skew_error)
    if abs(worst.skew) - worst.skew_error > MAX_SKEW:
        side = "ahead of" if worst.skew > 0 else "behind"
        said = f"the clock of {worst.name} is {abs(worst.skew):.1f} s {side} the clock of this process"
        return Line("clocks", said, "let an NTP client (chrony) set the clocks of all nodes")
    largest = max(max(0.0, abs(node.skew) - node.skew_error) for node in nodes)
    return Line(
        "clocks", f"within {max(largest, max(node.skew_error for node in nodes)):.2f} s of the clock of this process"
    )


def shared_memory(nodes: Sequence[NodeFacts]) -> Line:
    """Ray keeps objects in /dev/shm, or, much slower, on disk where that is too small."""
    small = [node for node in nodes if node.shared_memory < node.object_store]
    if small:
        node = min(small, key=lambda node: node.shared_memory - node.object_store)
        said = (
            f"{_gib(node.shared_memory)} on {_some([n.name for n in small])}, but Ray's object store needs "
            f"{_gib(node.object_store)}"
        )
        wanted = (
            f"raise it to {_gib(node.object_store)}: docker run --shm-size, or in Kubernetes an emptyDir of "
            "medium Memory"
        )
        return Line("/dev/shm", said, wanted)
    smallest = min(nodes, key=lambda node: node.shared_memory)
    return Line("/dev/shm", f"at least {_gib(smallest.shared_memory)}, {_gib(smallest.object_store)} of it for objects")


def threads(nodes: Sequence[NodeFacts], worker_cpus: float | None, workers: int | None) -> Line:
    """Whether processes start more threads than they have cores.

    Args:
        worker_cpus, workers: of the run, as far as it is known.
    """
    for node in nodes:
        processes = 1
        if worker_cpus and workers:
            processes = max(1, min(workers, int(node.cpus / worker_cpus + 1e-6)))
        if node.threads > 1 and processes * node.threads > node.cpus:
            said = (
                f"OMP_NUM_THREADS={node.threads} on {node.name}, where {processes} process{'es' * (processes > 1)} "
                f"of the run share {node.cpus:g} CPUs"
            )
            return Line(
                "threads", said, "unset OMP_NUM_THREADS where Ray is started, so that Ray sets it for each process"
            )
    return Line("threads", f"OMP_NUM_THREADS at most {max(node.threads for node in nodes)} in a process")


def resources(cpus: float, gpus: float, config: Config | None) -> Line:
    """Do the run's workers, data tasks and probes fit into what the cluster can have at most?"""
    have = f"{cpus:g} CPUs and {gpus:g} GPUs at most"
    if config is None:
        return Line("resources", f"{have}; give a CONFIG to compare them with")
    low, high = config.train.worker_range
    try:
        shares = shares_of(cpus, gpus, config, low)
    except InputError as error:
        said, _, remedy = str(error).rstrip(".").partition("; ")
        return Line("resources", said, remedy)
    said = f"{have}; {low} worker{'s' * (low > 1)} of {shares.worker:g} CPUs{' and a GPU each' * shares.use_gpu}, "
    said += f"data tasks of {shares.data_task:g}, probes of {shares.probe:g}"
    return Line("resources", said + (f"; up to {high} workers when there is room" if high > low else ""))


def shares_of(cpus: float, gpus: float, config: Config, workers: int) -> Shares:
    """What `raybert pretrain` would ask for.

    Raises:
        InputError: it can never be placed.
    """
    return plan_shares(
        cpus,
        gpus,
        workers=workers,
        worker_cpus=config.train.worker_cpus,
        task_cpus=config.data.task_cpus,
        probe_cpus=config.probe.cpus,
        probes=config.probe.workers,
        use_gpu=config.train.use_gpu,
    )


def dashboard(url: str, status: int | None) -> Line:
    """
    Args:
        url: where the dashboard listens; empty when there is none.
        status: of its answer to a request without a token; None when it cannot be reached from here.
    """
    if not url:
        return Line(
            "dashboard",
            "no dashboard is running, so jobs cannot be submitted or followed",
            "install 'ray[default]' on the head and start it with --include-dashboard=true",
        )
    if status is None:
        said = (
            f"{url} cannot be reached from here; run `raybert submit doctor` to check on the head node whether it "
            "requires a token"
        )
        return Line("dashboard", said, known=False)
    if status in (401, 403):
        return Line("dashboard", f"{url} requires a token")
    if _is_loopback(url):
        return Line("dashboard", f"{url} requires no token, but listens on the loopback address only")
    return Line(
        "dashboard",
        f"{url} requires no token: anyone who can reach it can run code on this cluster",
        "enable token authentication (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node, `ray get-auth-token "
        "--generate`), or start the head with --dashboard-host=127.0.0.1",
    )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def storage(subject: str, uri: str, nodes: Sequence[NodeFacts]) -> Line:
    """Can every node use this place?"""
    faults = {node.name: node.storage_faults[subject] for node in nodes if subject in node.storage_faults}
    if not faults:
        return Line(subject, f"every node can use {uri}")
    name, sentence = next(iter(faults.items()))
    said, _, remedy = sentence.rstrip(".").partition("; ")
    where = f" (on {_some(list(faults))})" if len(nodes) > 1 else ""
    return Line(subject, f"{said}{where}", remedy or f"make {uri} reachable from {name}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
