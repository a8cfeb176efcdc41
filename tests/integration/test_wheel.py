"""The wheel holds the library, whole and alone, and runs where there is no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=200)
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


def test_the_demo_runs_from_an_unpacked_wheel_in_an_empty_directory(wheel, tmp_path):
    """With few steps and texts. What it imports is the wheel's: the checkout is not on the path before it."""
    unpacked, empty = tmp_path / "unpacked", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    empty.mkdir()
    (tmp_path / "few.yaml").write_text(
        "{name: few, train: 'embedded://bbc_news', label: label, n_train: 60, n_test: 40, seed: 0, max_tokens: 32}"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "PYTEST"))}
    environment |= {"PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    code = "import sys, raybert; print(raybert.__file__); from raybert.cli import main; sys.argv[0] = 'raybert'; main()"
    settings = ["train.steps=12", "every.validation=12", "every.probe=12", "every.checkpoint=12"]
    settings += ["schedule.warmup_steps=2", "validation.samples=16", "train.workers=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--task", str(tmp_path / "few.yaml"), *settings],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == str(unpacked / "raybert" / "__init__.py")
    assert "untrained" in done.stdout
    assert lines[-1] == str(empty / "runs" / "demo-1" / "report.html")
    assert Path(lines[-1]).exists()
