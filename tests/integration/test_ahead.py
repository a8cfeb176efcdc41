"""Processes that are made ahead are the ones that a controller and its workers get."""

import os
import time

import psutil
import pytest
import ray

from raybert.train import ahead

pytestmark = pytest.mark.usefixtures("ray_cluster")
VARIABLE = {"RAYBERT_TEST_AHEAD": "1"}  # an environment that nothing else in this Ray has


class Parent:
    """As Ray Train's controller: asks for a worker with further variables."""

    def pids(self):
        child = ray.remote(num_cpus=0)(Child).options(runtime_env={"env_vars": VARIABLE | {"MORE": "2"}}).remote()
        return os.getpid(), ray.get(child.pid.remote())


class Child:
    def pid(self):
        return os.getpid()


def idle():
    found = psutil.process_iter(["cmdline"])
    return {process.pid for process in found if "".join(process.info["cmdline"] or []).startswith("ray::IDLE")}


def test_a_controller_and_its_worker_get_processes_that_were_made_ahead(monkeypatch):
    import ray.train.v2._internal.constants as constants

    monkeypatch.setattr(constants, "get_env_vars_to_propagate", lambda: dict(VARIABLE))
    monkeypatch.setattr(ahead, "PAUSE", 2.0)  # a raylet refuses when as many as it has CPUs are starting
    before, made = idle(), set()
    ahead.make_processes(1, {"MORE": "2"})
    expected = ahead.BEFORE + ahead.BEHIND + 2
    while len(made) < expected:
        time.sleep(0.2)
        made |= idle() - before
    environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | VARIABLE
    parent = ray.remote(num_cpus=0)(Parent).options(runtime_env={"env_vars": environment}).remote()
    assert set(ray.get(parent.pids.remote())) <= made


def test_the_run_goes_on_where_none_can_be_made(monkeypatch, caplog):
    def refuse(address, options):
        raise OSError("no raylet")

    monkeypatch.setattr(ahead, "init_grpc_channel", refuse)
    monkeypatch.setattr(ahead, "PAUSE", 0.0)
    caplog.set_level("INFO")
    ahead.make_processes(1, {})
    while "No process was made ahead: no raylet" not in caplog.text:
        time.sleep(0.05)
