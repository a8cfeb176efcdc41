"""A local Ray where the temporary directory's path is too long for its sockets."""

import os
import subprocess
import sys

CONNECT = """
import ray
from raybert import cluster
from raybert.errors import InputError
try:
    cluster.connect()
except InputError as error:
    raise SystemExit(f"error: {error}")
print("sum", ray.get(ray.remote(lambda: 1 + 1).remote()))
"""


def connect(**environment: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    command = [sys.executable, "-c", CONNECT]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


def test_a_long_temporary_directory_is_no_hindrance(tmp_path):
    long = tmp_path / ("scratch-" * 10)
    long.mkdir()
    done = connect(TMPDIR=str(long))
    assert "sum 2" in done.stdout, done.stderr
    assert f"TMPDIR={long} is too long for Ray's sockets" in done.stderr


def test_one_that_was_chosen_for_ray_is_refused(tmp_path):
    long = tmp_path / ("scratch-" * 10)
    done = connect(RAY_TMPDIR=str(long))
    assert done.returncode == 1
    assert f"error: RAY_TMPDIR={long} is too long" in done.stderr
    assert not long.exists()
