"""What several tests share: the data beside the project, and one local Ray for the whole session."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.gcs import Emulator

# A busy machine is no fault of the code.
hypothesis.settings.register_profile("raybert", deadline=None)
hypothesis.settings.load_profile("raybert")

# A stalled stream or a dead rank must fail in seconds, not in Ray's half hour; workers inherit these.
os.environ.setdefault("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "60")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "120")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")


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
    """One local Ray, with its dashboard, as a run has it; the directory of its session."""
    import ray

    context = ray.init(num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False)
    yield Path(context.address_info["session_dir"])
    ray.shutdown()
