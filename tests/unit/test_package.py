"""What a job carries to the cluster, and what the container image is made of."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import create_package

import raybert
from raybert.submit import SCRIPTS

ROOT = Path(raybert.__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"


def test_a_job_carries_the_code_and_little_else(tmp_path):
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    assert package.stat().st_size < 10e6
    with zipfile.ZipFile(package) as content:
        names = set(content.namelist())
    assert {"raybert/cli.py", "jobs/compact.yaml", *(f"jobs/{command}.py" for command in SCRIPTS)} <= names
    left_out = (".git/", ".venv/", "tests/", "docs/", "benchmarks/")
    assert not [name for name in names if name.startswith(left_out)]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def test_the_image_is_small_in_layers_and_runs_as_nobody_in_particular():
    found = instructions()
    starts = [index for index, (name, _) in enumerate(found) if name == "FROM"]
    assert len(starts) == 2
    last = found[starts[-1] :]
    assert sum(name in ("RUN", "COPY", "ADD") for name, _ in last) < 10
    assert [arguments for name, arguments in last if name == "USER"] == ["1000"]
    assert ("ARG", 'TORCH_INDEX=""') in found


def test_the_dockerfile_has_no_fault_that_hadolint_knows():
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_the_image_installs_is_pinned_to_what_is_tested():
    """Every package that the image's extras pull in has one version in constraints.txt: the one installed here."""
    (installed,) = re.findall(r'pip install --constraint constraints.txt "\.\[(.+?)\]"', DOCKERFILE.read_text())
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    open_requirements = [Requirement(f"raybert[{installed}]")]
    seen = set()
    while open_requirements:
        requirement = open_requirements.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        version = importlib.metadata.version(requirement.name)
        if name != "raybert":
            assert pinned.get(name) == version.partition("+")[0], f"{name} {version} is not what constraints.txt has"
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
            )
            key = (needed.name, tuple(sorted(needed.extras)))
            if wanted and key not in seen:
                seen.add(key)
                open_requirements.append(needed)
    assert len(seen) > 40


def test_the_build_steps_run_in_a_fresh_directory(tmp_path):
    """COPY and the last two steps of the build stage, in a virtual environment of its own."""
    context, source = allowed_by_dockerignore(), tmp_path / "src"
    source.mkdir()
    for name, arguments in instructions():
        if name == "COPY" and not arguments.startswith("--from"):
            *sources, target = shlex.split(arguments)
            for each in sources:
                assert each in context, f"{each} is copied into the image and .dockerignore keeps it out"
                copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
                copy(ROOT / each, source / (each if target == "./" else target))
    (commands,) = [arguments for name, arguments in instructions() if name == "RUN" and "pip install" in arguments]
    *_, install, check = commands.split("&&")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = os.environ | {"PATH": f"{environment}/bin:{os.environ['PATH']}"}
    subprocess.run(f"{install} --no-deps --quiet", shell=True, cwd=source, env=python, check=True)
    where = f"{environment}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    assert Path(where, "raybert", "probe", "tasks", "bbc_news.yaml").exists()
    # The packages that it needs are here already and are not installed twice; -I would hide them.
    borrowed = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    check = check.replace("python -I", "python")
    subprocess.run(check, shell=True, cwd=tmp_path, env=python | {"PYTHONPATH": borrowed}, check=True)


def allowed_by_dockerignore() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "what is not named must stay out of the build context"
    return [line[1:] for line in lines if line.startswith("!")]


def test_processes_start_without_what_they_do_not_need():
    """Every process of a run pays for what is imported at the top: torch takes a second or two, the others tenths."""
    light = ("cli", "data.text.prepare", "data.text.phases", "data.stream", "train.ingest", "cluster.jobs")
    trial = ("report.trackers", "report.watch", "storage")  # of each trial's driver and controller
    code = f"import sys, {', '.join(f'raybert.{name}' for name in (*light, *trial))}; "
    code += "print(*sys.modules.keys() & {'torch', 'aiohttp', 'matplotlib', 'sklearn'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
