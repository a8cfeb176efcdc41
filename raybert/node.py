"""A Ray node that drains itself before it leaves: ``python -m raybert.node --address=HOST:PORT --num-cpus=N ...``.

Takes the arguments of `ray start` and runs it in the foreground. Told to end with SIGTERM, as a cloud or Kubernetes
does with a machine that it takes back, it first has the node drained: Ray places nothing on it any more, the training
that runs there saves a checkpoint and moves on. Ray's own answer to SIGTERM is to be gone at once.
"""

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import FrameType

from raybert.ray_internals.names import TRAIN_WORKER

logger = logging.getLogger(__name__)

LABEL = "raybert-node"
# Seconds that clouds leave a machine: 30 on Google Cloud, whose spot machines this is for; more is of no use there.
GRACE = float(os.environ.get("RAYBERT_NODE_GRACE_S", "25"))


def main(arguments: list[str]) -> int:
    """Run until Ray ends, or until SIGTERM and then until the training has left; returns Ray's exit code."""
    name, arguments = uuid.uuid4().hex, _joined(arguments)
    ray = Path(sys.executable).with_name("ray")
    # `ray start` takes the last --labels alone.
    given = [word.partition("=")[2] for word in arguments if word.startswith("--labels=")]
    labels = ",".join([f"{LABEL}={name}", *(label for label in given if label)])
    others = [word for word in arguments if not word.startswith("--labels=")]
    process = subprocess.Popen([str(ray), "start", "--block", f"--labels={labels}", *others])

    def on_sigterm(_: int, __: FrameType | None) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return process.wait()
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            _drain(name, arguments)
            end = time.monotonic() + GRACE
            # A training worker is the only kind of process that has something to save.
            while _has_workers(process.pid) and time.monotonic() < end and process.poll() is None:
                time.sleep(0.2)
        except Exception as error:
            print(f"The node could not be drained: {error}", file=sys.stderr)
        process.terminate()
        return process.wait()


def _joined(arguments: list[str]) -> list[str]:
    """``--address X`` as ``--address=X``: `ray start` takes both, and these two are read here."""
    found: list[str] = []
    for word in arguments:
        if found and found[-1] in ("--address", "--labels"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _drain(name: str, arguments: list[str]) -> None:
    """Tell the cluster that this node goes."""
    from raybert.ray_internals.core import drain_node  # imports Ray, which this process needs only now

    address = next((word.partition("=")[2] for word in arguments if word.startswith("--address=")), "")
    drain_node(address, (LABEL, name), seconds=GRACE, why="the node received SIGTERM")


def _has_workers(root: int) -> bool:
    parents: dict[int, int] = {}
    training: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, title = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
        if title.startswith(TRAIN_WORKER.encode()):
            training.add(int(path.name))
    return any(_descends(pid, root, parents) for pid in training)


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != root:
        pid = parents[pid]
    return pid == root


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
