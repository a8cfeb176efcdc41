"""What several tests share: the data beside the project, and one local Ray for the whole session."""

import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.gcs import Emulator
from tests.processes import STARTS
from tests.waiting import stacks

# A busy machine is no fault of the code.
hypothesis.settings.register_profile("raybert", deadline=None)
hypothesis.settings.load_profile("raybert")

# Models of a few thousand weights gain nothing by threads, which wait for each other by taking a core each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's own limits; workers inherit them. They end a hang before a test gives up, and never what is only slow.
os.environ.setdefault("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "400")
os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "400")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "200")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A node starts no more processes at a time than it has CPUs: where it has one, a run's twelve one after the other.
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "12")
# Ray's processes are nice (15): beside other work on all cores they would get a thirtieth of one.
os.environ.setdefault("RAY_worker_niceness", "0")
# The processes that a node starts for its first driver ahead have another environment than a run's: no run uses them.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# All processes that are started from now on begin with tests/start/sitecustomize.py.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "start"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


# Of the tests outside unit/: these use no Ray, or at most a small one of their own; the last ones, when there is room.
WITHOUT_CLUSTER = ("test_bad_data.py", "test_fuzz.py")
LAST = ("test_temporary.py", "test_wheel.py")


class Halves(LoadScopeScheduling):
    """`make test` has two processes for the tests (pytest-xdist), since those that use Ray wait most of their time.

    What is one scope goes to one process: all tests that use Ray, since two clusters at a time are too much for two
    cores (they are the longest, and begin, as pytest finds them first); and each other file.
    """

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


def scope(nodeid: str) -> str:
    *folders, name = nodeid.partition("::")[0].split("/")
    return name if "unit" in folders or name in WITHOUT_CLUSTER + LAST else "ray"


@functools.cache
def share_cpus(nice: int) -> None:
    """Let this process and all that it starts have their part of the CPUs as one (Linux; see sched(7), autogroup)."""
    with contextlib.suppress(OSError):  # a group of its own already
        os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Of the two processes for the tests, the one without Ray stands back: the other half is the longer one."""
    if "PYTEST_XDIST_WORKER" in os.environ and scope(item.nodeid) != "ray":
        share_cpus(0 if item.path.name in LAST else 5)  # 5: a quarter, where both want more than there is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name in LAST)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Halves:
    """pytest-xdist's own `loadgroup` does not divide by groups with pytest 9.2."""
    return Halves(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Before pytest gives a test up, which ends the session, the stacks of all processes are printed."""
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker else float(item.config.getini("timeout"))
    timer = threading.Timer(limit - 120, lambda: print(stacks(), file=sys.__stderr__, flush=True))
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the data folder {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def gcs() -> Iterator[Emulator]:
    """A Google Cloud Storage server; every process that is started from now on takes it for Google's."""
    emulator = Emulator()
    for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        os.environ[name] = emulator.endpoint
    yield emulator
    emulator.stop()


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Credentials in the environment of every process that is started from now on; none of them is of any use."""
    key = tmp_path_factory.mktemp("credentials") / "key.json"
    key.write_text(json.dumps({"type": "service_account", "private_key": "planted-google-private-key-5c1f"}))
    os.environ["GOOGLE_APPLICATION_CREDENTIALS"] = str(key)
    os.environ["AWS_SECRET_ACCESS_KEY"] = "planted-aws-secret-key-77ab"
    os.environ["AZURE_STORAGE_KEY"] = "planted-azure-key-90de"
    return ["planted-google-private-key-5c1f", "planted-aws-secret-key-77ab", "planted-azure-key-90de"]


@pytest.fixture(scope="session")
def ray_cluster(gcs: Emulator, secrets: list[str]) -> Iterator[Path]:
    """One local Ray, with its dashboard, as `raybert.cluster.start` starts it; the directory of its session."""
    import ray

    from raybert.cluster import connection

    os.environ.update(connection.LOCAL)  # clusters of a test's own go without it
    connection.STARTS = STARTS
    context = connection.launch(cpus=4)
    yield Path(context.address_info["session_dir"])
    ray.shutdown()
