"""A local Ray where the temporary directory's path is too long for its sockets."""

import os
import subprocess
import sys

CONNECT = """
import ray
from raybert import cluster
cluster.connect()
print("sum", ray.get(ray.remote(lambda: 1 + 1).remote()))
"""


def test_a_long_temporary_directory_is_no_hindrance(tmp_path):
    long = tmp_path / ("scratch-" * 10)
    long.mkdir()
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        env=inherited | {"TMPDIR": str(long)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "sum 2" in done.stdout, done.stderr
    assert f"TMPDIR={long} is too long for Ray's sockets" in done.stderr
