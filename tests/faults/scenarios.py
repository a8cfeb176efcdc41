"""The faults: each is done to a run at a random moment, and says what the run must have told of it."""

import contextlib
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from raybert import storage
from raybert.model.directory import REQUIRED, SUMS
from raybert.ray_internals.names import SNAPSHOT
from raybert.train.recovery.repair import DAMAGED
from tests.clusters import Cluster, Node
from tests.faults.driver import STRETCH, Driver, kill, pick
from tests.gcs import Fault
from tests.waiting import wait_for

Scenario = Callable[[Driver, Cluster, random.Random], None]

# How a process ends: killed, asked to go, crashed.
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT)
WORKER, CONTROLLER, COORDINATOR = "RayTrainWorker", "TrainController", "SplitCoordinator"


def moment(driver: Driver, rng: random.Random) -> int:
    """Wait for a random step of the stretch that this fault has to itself."""
    step = rng.randint(driver.stretch + 2, driver.stretch + STRETCH - 15)
    driver.wait_for_step(step)
    return step


def worker_killed(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    moment(driver, rng)
    kill(pick(rng, cluster.pids(WORKER)), rng.choice(ENDS))


def worker_killed_twice(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """The second time while the group starts again."""
    moment(driver, rng)
    known = cluster.pids(WORKER)
    kill(pick(rng, known))
    kill(driver.wait_for("new workers", lambda: sorted({*cluster.pids(WORKER)} - {*known}))[0])


def data_task_killed(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """As soon as one is seen: a tiny run's data are ready in a second, so the stream is made to begin anew."""
    moment(driver, rng)
    kill(pick(rng, cluster.pids(WORKER)))
    kill(pick(rng, driver.wait_for("a data task", lambda: cluster.pids("build_chapters", "ReadRange"))))


def coordinator_killed(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    moment(driver, rng)
    kill(pick(rng, cluster.pids(COORDINATOR)), rng.choice(ENDS))


def controller_killed(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    moment(driver, rng)
    known = len(driver.faults("restart"))
    kill(pick(rng, cluster.pids(CONTROLLER)), rng.choice(ENDS))
    driver.wait_for_fault("restart", known)


def driver_killed(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    moment(driver, rng)
    driver.kill()
    driver.start("--resume", driver.uri)


def driver_interrupted(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    moment(driver, rng)
    driver.kill(signal.SIGINT)
    assert driver.process is not None
    assert driver.process.returncode == 130, driver.said[-2000:]
    driver.start("--resume", driver.uri)


def driver_interrupted_twice(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """Ctrl-C, and again by somebody who does not want to wait for the checkpoint."""
    moment(driver, rng)
    assert driver.process is not None
    driver.process.send_signal(signal.SIGINT)
    time.sleep(rng.uniform(0.05, 0.2))
    driver.kill(signal.SIGINT)
    assert driver.process.returncode == 130, driver.said[-2000:]
    driver.start("--resume", driver.uri)


def second_driver(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """Somebody starts the run once more while it runs: refused, and nothing happens to the first.

    Its workers crawl meanwhile: it must be there for longer than the second driver needs to start.
    """
    moment(driver, rng)
    workers = cluster.pids(WORKER)
    second = Driver(cluster, driver.uri, driver.log.with_name("second.log"))
    second.start("--resume", driver.uri)
    events = set(storage.list_files(f"{driver.uri}/tensorboard"))
    assert events or driver.gcs is not None  # where they are copied now and then
    assert second.process is not None

    def ended() -> bool:
        for sign, seconds in ((signal.SIGSTOP, 2.0), (signal.SIGCONT, 0.05)):
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, sign)
            time.sleep(seconds)
        return second.process.poll() is not None

    wait_for("the second driver to be refused", ended, signs=[second.log], told=lambda: second.said)
    assert second.process.returncode == 2, second.said
    assert "Another driver" in second.said
    assert events <= set(storage.list_files(f"{driver.uri}/tensorboard"))


def a_node(cluster: Cluster, rng: random.Random) -> Node:
    """One that is not the head, with a worker where there is such a one."""
    others = [node for node in cluster.nodes[1:] if not node.gone]
    return rng.choice([node for node in others if node.pids(WORKER)] or others)


def node_lost(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """A node is switched off; another one comes later."""
    moment(driver, rng)
    node = a_node(cluster, rng)
    node.lose()
    time.sleep(rng.uniform(0, 5))
    cluster.add(node.cpus)


def node_terminated(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """The same, told by SIGTERM."""
    moment(driver, rng)
    node = a_node(cluster, rng)
    node.process.send_signal(signal.SIGTERM)
    time.sleep(rng.uniform(0, 3))
    node.lose()
    cluster.add(node.cpus)


def _wait_for_a_checkpoint(driver: Driver) -> None:
    driver.wait_for("a checkpoint", lambda: storage.exists(f"{driver.uri}/{SNAPSHOT}"))


def _newest(driver: Driver) -> str:
    record = storage.read_json(f"{driver.uri}/{SNAPSHOT}")
    return f"{driver.uri}/{record['latest_checkpoint_result']['checkpoint_dir_name']}"


def newest_damaged(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """A byte of the newest checkpoint flips, or its end is gone, and the run has to go on from it."""
    moment(driver, rng)
    _wait_for_a_checkpoint(driver)
    known = len(driver.faults("damaged_checkpoint"))
    driver.kill()
    newest = _newest(driver)
    directory, _, name = newest.rpartition("/")
    file = f"{newest}/{rng.choice(REQUIRED)}"
    content = bytearray(storage.read_bytes(file))
    if rng.random() < 0.5:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    storage.write_bytes(file, bytes(content))
    driver.start("--resume", driver.uri)
    assert name in driver.wait_for_fault("damaged_checkpoint", known)["text"]
    assert storage.exists(f"{directory}/{DAMAGED}{name}")


def newest_damaged_while_running(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """The same under a controller that has the checkpoint on its list."""
    moment(driver, rng)
    known = len(driver.faults("damaged_checkpoint"))
    _wait_for_a_checkpoint(driver)
    workers = cluster.pids(WORKER)
    for pid in workers:
        kill(pid, signal.SIGSTOP)
    damaged = ""
    while (newest := _newest(driver)) != damaged:  # what they had reported may still be committed; nothing new comes
        storage.write_bytes(f"{newest}/training_state.pt", b"")
        damaged = newest
        time.sleep(5)
    for pid in workers:
        kill(pid)
    driver.wait_for_fault("damaged_checkpoint", known)


def record_damaged(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """Ray Train's record of the checkpoints is cut off in the middle of a write."""
    moment(driver, rng)
    _wait_for_a_checkpoint(driver)
    driver.kill()
    content = storage.read_bytes(f"{driver.uri}/{SNAPSHOT}")
    storage.write_bytes(f"{driver.uri}/{SNAPSHOT}", content[: rng.randrange(len(content))])
    driver.start("--resume", driver.uri)


def upload_cut(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """Rank 0 dies while a checkpoint is being written: what has its name is whole, or has no config.json (a bucket)."""
    checkpoints = f"{driver.uri}/checkpoints"
    driver.wait_for_step(driver.stretch + 2)
    if driver.gcs is not None:
        driver.gcs.inject(Fault("slow", match="^(POST|PUT) /upload", every=1, seconds=rng.uniform(0.2, 1)))

    def written() -> dict[str, set[str]]:
        """The files of each checkpoint."""
        found: dict[str, set[str]] = {}
        for uri in storage.list_files(checkpoints):
            directory, _, name = uri.rpartition("/")
            found.setdefault(directory.rpartition("/")[2], set()).add(name)
        return {directory: names for directory, names in found.items() if directory.startswith("step-")}

    def under_way() -> bool:
        if driver.gcs is not None:
            return any("config.json" not in names for names in written().values())
        return any(Path(uri).name.startswith(".step-") for uri in storage.list_dir(checkpoints))

    driver.wait_for("a checkpoint under way", under_way)
    for pid in cluster.pids(WORKER):
        kill(pid)
    for names in written().values():
        assert names >= {*REQUIRED, SUMS} or (driver.gcs is not None and "config.json" not in names)
    if driver.gcs is not None:
        driver.gcs.inject()


def out_of_memory(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """A worker may take no more memory than it has between two steps: within one it has more."""
    moment(driver, rng)
    known = len(driver.faults("out_of_memory"))
    pid = pick(rng, cluster.pids(WORKER))
    pages = []
    for _ in range(100):
        pages.append(int(Path(f"/proc/{pid}/statm").read_text().split()[0]))
        time.sleep(0.005)
    size = min(pages) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
    driver.wait_for_fault("out_of_memory", known)


def rank_hung(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """A worker stops, and answers nobody: it is named with its stack, and the group goes on without it."""
    moment(driver, rng)
    pid = pick(rng, cluster.pids(WORKER))
    kill(pid, signal.SIGSTOP)
    fault = driver.wait_for("the fault in the list", lambda: [f for f in driver.faults("hang") if f["pid"] == pid])[0]
    assert fault["node"]
    assert "raybert" in fault["stack"], fault["stack"]


def storage_down(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """Nothing can be written where the checkpoints go, for a while; a bucket answers nothing else either."""
    moment(driver, rng)
    seconds = float(os.environ.get("RAYBERT_OUTAGE_S", "15"))
    if driver.gcs is not None:
        driver.gcs.inject(Fault("status", every=1, status=rng.choice([429, 500, 503])))
        time.sleep(seconds)
        driver.wait_for("requests to the bucket", lambda: sum(driver.gcs.injected().values()) > 3)
        driver.gcs.inject()
        return
    place = Path(driver.uri) / "checkpoints"
    away = place.with_name("away")
    driver.wait_for("checkpoints", place.exists)
    place.rename(away)
    place.write_bytes(b"")
    time.sleep(seconds)
    place.unlink()
    away.rename(place)


def disk_full(driver: Driver, cluster: Cluster, rng: random.Random) -> None:
    """The disk that checkpoints and the ledger are written to is full, until somebody makes room.

    Of a run in a bucket it is the workers' temporary directory.
    """
    moment(driver, rng)
    disk = Path(driver.uri).parent if driver.gcs is None else cluster.temporary
    ballast = disk / "ballast"
    if not disk.is_mount():
        warnings.warn("disk_full was not done: no tmpfs can be mounted here, and the disk is not ours", stacklevel=1)
        return
    end, full = time.monotonic() + rng.uniform(5, 15), 0
    with open(ballast, "wb", buffering=0) as file:
        while (
            time.monotonic() < end or not full
        ):  # the run gives room back, where it takes away what it could not write
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            full += shutil.disk_usage(disk).free < 4096
            time.sleep(0.1)
    ballast.unlink()


SCENARIOS: dict[str, Scenario] = {
    function.__name__: function
    for function in (
        controller_killed,
        rank_hung,
        newest_damaged_while_running,
        newest_damaged,
        worker_killed,
        driver_killed,
        node_lost,
        data_task_killed,
        upload_cut,
        out_of_memory,
        node_terminated,
        record_damaged,
        coordinator_killed,
        driver_interrupted,
        worker_killed_twice,
        second_driver,
        storage_down,
        disk_full,
        driver_interrupted_twice,
    )
}
