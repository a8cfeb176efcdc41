"""Whatever raybert uses of Ray beyond its public API is still there, and is used in `raybert.ray_internals` alone.

A test that fails here says what the installed Ray has moved, and what for raybert needs it.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import mmap
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
from packaging.requirements import Requirement

from raybert.ray_internals import core, data, names, train
from raybert.train.recovery.repair import repair

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "raybert" / "ray_internals"
RAY = Path(ray.__file__).parent
# What Ray runs itself, asked by tests what it makes of our files.
CHECKERS = {"tests/unit/test_cluster_files.py", "tests/unit/test_package.py", "tests/unit/test_submit.py"}
# Underscored names of other packages.
OTHERS = {
    *("os._exit", "sys._current_frames", "torch._dynamo", "torch._softmax_backward_data", "fs._strip_protocol"),
    "torch.ops.aten._flash_attention_forward",  # a worker tries it before it is used
}

GROUPS = "the placement groups of dead controllers are removed"
START = "a Ray that was not up in time is started again"
STOP = "a run is asked to stop"
DRAIN = "a node that is about to go is drained"
AHEAD = "the stream stays a few chapters ahead"
LEAVE = "workers learn that a node goes"
UPLOAD = "`raybert submit` measures what it uploads"
RESIZE = "an elastic run takes a number of workers that divides the batch, at a checkpoint"
POLICIES = "ray.data._internal.execution.backpressure_policy"
EXECUTION = "ray.data._internal.execution"
SCALING = "ray.train.v2._internal.execution.scaling_policy"
# What is used, the arguments that it is given, and what needs it.
USED: list[tuple[str, list[str], str]] = [
    ("ray._private.services:find_gcs_addresses", [], "`raybert watch` and `probe` find the Ray of this machine"),
    ("ray._private.node:Node.kill_all_processes", ["self", "check_alive", "allow_graceful", "wait"], START),
    ("ray._private.node:Node.get_logs_dir_path", [], START),
    ("ray._private.worker:_global_node", [], "`raybert doctor` finds the dashboard"),
    ("ray._private.node:Node.webui_url", [], "`raybert doctor` finds the dashboard"),
    ("ray.experimental.internal_kv:_internal_kv_put", ["key", "value", "namespace"], STOP),
    ("ray.experimental.internal_kv:_internal_kv_del", ["key", "namespace"], STOP),
    ("ray.experimental.internal_kv:_internal_kv_exists", ["key", "namespace"], STOP),
    ("ray._private.state:state.job_table", [], GROUPS),
    ("ray._private.state:state.actor_table", ["actor_id"], GROUPS),
    ("ray._private.state:state._connect_and_get_accessor", [], GROUPS),
    ("ray._raylet:GlobalStateAccessor.get_placement_group_table", [], GROUPS),
    ("ray._raylet:ActorID.is_nil", [], GROUPS),
    ("ray._raylet:PlacementGroupID.from_hex", [], GROUPS),
    ("ray.core.generated.gcs_pb2:PlacementGroupTableData.REMOVED", [], GROUPS),
    ("ray._raylet:GcsClient", [], DRAIN),
    ("ray._raylet:InnerGcsClient.get_all_node_info", [], DRAIN),
    ("ray._raylet:InnerGcsClient.drain_node", [], DRAIN),
    ("ray.core.generated.autoscaler_pb2:DrainNodeReason", [], DRAIN),
    ("ray.data._internal.datasource.range_datasource:RangeDatasource", ["n", "column_name"], "the stream is cheap"),
    ("ray.data:Dataset.repartition", ["target_num_rows_per_block"], "the stream's blocks are equal"),
    (f"{POLICIES}:BackpressurePolicy.can_add_input", ["self", "op"], AHEAD),
    (f"{POLICIES}:ENABLED_BACKPRESSURE_POLICIES", [], AHEAD),
    (f"{POLICIES}:ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY", [], AHEAD),
    (f"{EXECUTION}.interfaces:PhysicalOperator.num_active_tasks", ["self"], AHEAD),
    (f"{EXECUTION}.interfaces:PhysicalOperator.output_dependencies", [], AHEAD),
    (f"{EXECUTION}.operators.map_operator:MapOperator", [], AHEAD),
    (f"{EXECUTION}.interfaces.op_runtime_metrics:OpRuntimeMetrics.average_bytes_outputs_per_task", [], AHEAD),
    (
        f"{EXECUTION}.resource_manager:ResourceManager.get_mem_op_outputs",
        ["op", "include_ineligible_downstream"],
        AHEAD,
    ),
    (f"{EXECUTION}.streaming_executor_state:OpState.has_pending_bundles", ["self"], AHEAD),
    ("ray.train.v2._internal.execution.context:get_train_context", [], LEAVE),
    ("ray.train.v2._internal.execution.preemption:PreemptionContext", [], LEAVE),
    (f"{SCALING}.elastic:ElasticScalingPolicy._count_possible_workers", ["self", "reserved_resources"], RESIZE),
    (
        f"{SCALING}.elastic:ElasticScalingPolicy.make_decision_for_running_worker_group",
        ["self", "worker_group_state", "worker_group_status"],
        RESIZE,
    ),
    (f"{SCALING}:NoopDecision", [], RESIZE),
    (f"{SCALING}:ResizeDecision", ["num_workers"], RESIZE),
    (f"{SCALING}:ScalingDecision", [], RESIZE),
    ("ray.train:ScalingConfig._resources_per_worker_not_none", [], RESIZE),
    ("ray.train.torch:TorchTrainer._initialize_and_run_controller", ["self", "scaling_policy"], RESIZE),
    ("ray.train.torch:TorchTrainer._create_default_callbacks", ["self"], "a run has no cleaner of placement groups"),
    (
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        [],
        "a run has no cleaner of placement groups",
    ),
    ("ray._private.runtime_env.packaging:_dir_travel", ["path", "excludes", "handler", "include_gitignore"], UPLOAD),
    ("ray._private.ray_constants:RAY_RUNTIME_ENV_IGNORE_GITIGNORE", [], UPLOAD),
    ("ray.tune.execution:class_cache.ENV_VARS_TO_PROPAGATE", [], "a trial's logs hold no credentials"),
]


def find(path: str) -> Any:
    """The object at ``module:name.name``, and None where there is none, or no such module."""
    module, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            is_module = inspect.ismodule(found) and not hasattr(found, attribute)
            found = importlib.import_module(f"{found.__name__}.{attribute}") if is_module else getattr(found, attribute)
    except (ImportError, AttributeError):
        return None
    return found


def moved(what: str, use: str) -> str:
    return (
        f"Ray {ray.__version__} has no {what}, by which {use}: look for its new place, and mend raybert.ray_internals"
    )


@pytest.mark.parametrize(("path", "arguments", "use"), USED, ids=[path.partition(":")[2] for path, *_ in USED])
def test_what_is_used_is_there_and_takes_what_it_is_given(path, arguments, use):
    if path == "ray._private.worker:_global_node":  # None before Ray is started
        assert "_global_node" in vars(ray._private.worker), moved(path, use)
        return
    found = find(path)
    assert found is not None, moved(path, use)
    if arguments:
        known = inspect.signature(found).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        for argument in arguments:
            assert takes_all or argument in known, moved(f"argument {argument} of {path}", use)


def test_the_node_is_found_in_the_traceback(monkeypatch):
    from ray._private.node import Node

    def begin(self, logs):
        if logs:
            self._logs_dir = logs
        raise ValueError("half way")

    ended = []
    monkeypatch.setattr(Node, "__init__", begin)
    monkeypatch.setattr(Node, "kill_all_processes", lambda self, **how: ended.append(how["wait"]))
    for logs, found in (("/tmp/ray/s/logs", Path("/tmp/ray/s/logs")), ("", None)):
        with pytest.raises(ValueError, match="half way") as caught:
            Node(logs)
        assert core.end_unstarted(caught.value) == found
    assert ended == [True, True]
    assert core.end_unstarted(ValueError("before there was a node")) is None


def test_the_fields_of_ray_s_records_have_their_names():
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics
    from ray.train.v2._internal.execution.context import TrainContext
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

    group = set(PlacementGroupTableData.DESCRIPTOR.fields_by_name)
    used = {"placement_group_id", "creator_job_id", "creator_actor_id", "is_detached", "state"}
    assert used <= group, moved(f"fields {used - group} of a placement group", "groups of dead controllers are removed")
    fields = {field.name for field in dataclasses.fields(OpRuntimeMetrics)}
    assert "num_tasks_finished" in fields, moved("OpRuntimeMetrics.num_tasks_finished", "the stream reads ahead")
    fields = {field.name for field in dataclasses.fields(ResizeDecision)}
    assert "num_workers" in fields, moved("ResizeDecision.num_workers", "an elastic run changes its size")
    assert hasattr(PreemptionContext(), "preemption_info"), moved("preemption_info", "workers learn that a node goes")
    fields = {field.name for field in dataclasses.fields(TrainContext)}
    assert "preemption_context" in fields, moved("preemption_context", "workers learn that a node goes")


def test_an_elastic_policy_asks_how_many_workers_fit():
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    class Recorded:
        def fitting(self, nodes, worker):
            self.asked = nodes, worker
            return 3

        def accepts(self, workers, wanted):
            return True

    resizing = Recorded()
    scaling, reserved = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2}), {"node": {"CPU": 6.0}}
    try:
        assert ElasticScalingPolicy(scaling)._count_possible_workers(reserved) == 3
    except (AttributeError, TypeError):  # Ray 2.59 has a list without the nodes' IDs
        pytest.fail(moved("reserved resources by node ID", RESIZE))
    policy = train.ResizingPolicy(scaling, resizing)
    assert policy._count_possible_workers(reserved) == 3
    assert resizing.asked == (reserved, {"CPU": 2})
    assert hasattr(policy, "_latest_monitor_time"), moved("_latest_monitor_time", "a put-off resize is looked at again")


def test_a_trainer_has_a_cleaner_to_leave_out():
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    options = {"train_loop_per_worker": print, "scaling_config": ScalingConfig(num_workers=1)}
    theirs = [type(callback).__name__ for callback in TorchTrainer(**options)._create_default_callbacks()]
    ours = [type(callback).__name__ for callback in train.ResizingTrainer(None, **options)._create_default_callbacks()]
    gone = "PlacementGroupCleanerCallback"
    assert [name for name in theirs if name != gone] == ours
    assert gone in theirs, "Ray Train has no cleaner of placement groups any more; ResizingTrainer need not remove it"


def test_credentials_are_withheld_from_trials(monkeypatch):
    from ray.tune.execution import class_cache

    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"AWS_SECRET_ACCESS_KEY", "OTHER"})
    train.withhold_from_trials("AWS_")
    assert sorted(class_cache.ENV_VARS_TO_PROPAGATE) == ["OTHER"]


# -- names -----------------------------------------------------------------------------------------------------------


def test_ray_train_reads_the_variables():
    source = "".join((RAY / path).read_text() for path in ("train/constants.py", "train/v2/_internal/constants.py"))
    of_controller = (names.STATE_TRACKING, names.PREEMPTION_WATCHER)
    for name in (*of_controller, names.PREEMPTION_POLL_SECONDS, names.HEALTH_CHECK_SECONDS):
        assert f'"{name}"' in source, moved(f"variable {name}", "Ray Train's controller is told how to behave")


def in_binary(path: str, text: str) -> bool:
    with (RAY / path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text.encode()) >= 0


def test_the_raylet_reads_the_variables():
    for name in (names.STARTUP_CONCURRENCY, names.IDLE_PROCESSES, names.PRESTART):
        known = in_binary("core/src/ray/raylet/raylet", name.removeprefix("RAY_"))
        assert known, moved(f"variable {name}", "the Ray that a command starts keeps as many processes as it needs")


def test_texts_of_errors_that_are_looked_for_are_ray_s():
    known = names.START_TIMED_OUT in inspect.getsource(ray._private.node.Node.__init__)
    assert known, moved(f"text {names.START_TIMED_OUT!r}", START)
    assert in_binary("core/src/ray/gcs/gcs_server", names.NODE_LOST), moved(
        f"text {names.NODE_LOST!r}", "faults say so"
    )
    known = in_binary("core/src/ray/raylet/raylet", names.OUT_OF_MEMORY)
    assert known, moved(f"text {names.OUT_OF_MEMORY!r}", "a fault says that memory ran out")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ray.train.v2._internal.exceptions", names.WORKER_LOST),
        ("ray.train.v2._internal.exceptions", names.WORKER_SILENT),
        ("ray.data.exceptions", names.DATA_STALLED),
        ("ray.train.v2._internal.execution.controller", names.TRAIN_CONTROLLER),
        ("ray.train.v2._internal.execution.worker_group.worker", names.TRAIN_WORKER.removeprefix(names.PROCESS)),
    ],
)
def test_classes_that_are_known_by_name_are_there(module, name):
    assert inspect.isclass(find(f"{module}:{name}")), moved(
        f"class {name} in {module}", "an error or a process is known"
    )


def test_other_names_are_ray_s():
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    assert names.SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, moved(names.SNAPSHOT, "a run finds its checkpoints")
    assert names.HEAD_RESOURCE == HEAD_NODE_RESOURCE_NAME, moved(names.HEAD_RESOURCE, "a cluster has an identity")
    assert importlib.util.find_spec(names.PROGRESS_LOGGER), moved(names.PROGRESS_LOGGER, "prepare's bar is undisturbed")
    for monitor in ("autoscaler/_private/monitor.py", "autoscaler/v2/monitor.py"):
        source = (RAY / monitor).read_text()
        for flag in (names.MONITOR_CONFIG, names.MONITOR_CLUSTER):
            assert f'"{flag}"' in source, moved(f"{flag} of {monitor}", "an autoscaler's limits are read")


def test_ray_train_reads_the_record_that_is_made_for_it(tmp_path):
    """A run whose record of checkpoints is lost gets a new one, from which Ray Train goes on."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    from raybert.model.bert import Bert
    from raybert.model.config import BertConfig
    from raybert.model.optimizer import build
    from raybert.train import checkpoint

    bert = Bert(BertConfig(vocab_size=101, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    adam = build(bert, lr=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-6)
    snap = checkpoint.snapshot(bert, adam, step=7, elapsed_seconds=0.0, best_validation_loss=1.0)
    checkpoint.write(snap, f"{tmp_path}/checkpoints/step-00000007")
    assert len(repair(str(tmp_path))) == 1
    state = _CheckpointManagerState(**json.loads((tmp_path / names.SNAPSHOT).read_bytes()))
    assert state.latest_checkpoint_result.checkpoint_dir_name == "checkpoints/step-00000007"
    assert state.current_report_index == 1


# -- the door --------------------------------------------------------------------------------------------------------


def is_private(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "ray" and (
        any(part.startswith("_") for part in parts)
        or module.startswith(("ray.core.generated", "ray.experimental", "ray.tune.execution"))
    )


def private_uses(path: Path) -> set[str]:
    """Names that a file imports from Ray's private modules, and underscored attributes of what is not its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"self", "cls", "super()"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name for name in imported if is_private(name)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if is_private(name.name)}
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            whose = ast.unparse(node.value)
            if whose not in own and f"{whose}.{node.attr}" not in OTHERS:
                found.add(f"{whose}.{node.attr}")
    return found


def test_no_other_module_uses_what_is_private():
    folders = [ROOT / name for name in ("raybert", "benchmarks", "jobs")]
    for path in (path for folder in folders for path in folder.rglob("*.py") if DOOR not in path.parents):
        found = private_uses(path)
        assert not found, f"{path.relative_to(ROOT)} uses {sorted(found)}: put it into raybert/ray_internals"


def test_tests_import_what_is_private_only_to_have_files_checked():
    for path in (ROOT / "tests").rglob("*.py"):
        imported = {name for name in private_uses(path) if is_private(name)}
        if path != Path(__file__) and str(path.relative_to(ROOT)) not in CHECKERS:
            assert not imported, f"{path.relative_to(ROOT)} imports {sorted(imported)}: use raybert.ray_internals"


def test_no_other_class_overrides_what_is_private():
    """A class outside of the door that is derived from one of Ray's may override its public methods alone."""
    for path in (ROOT / "raybert").rglob("*.py"):
        if DOOR in path.parents:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        origins = {
            name.asname or name.name: f"{node.module}:{name.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray.")
            for name in node.names
        }
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            bases = [find(origins[base.id]) for base in node.bases if isinstance(base, ast.Name) and base.id in origins]
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            for base in bases:
                taken = {name for name in methods if re.match("_[a-z]", name)} & set(dir(base))
                assert not taken, f"{path.name}: {node.name} overrides {taken} of {base}: put it into ray_internals"


def test_every_private_name_of_the_door_is_in_the_list_above():
    listed = {path.replace(":", ".") for path, *_ in USED}
    for path in DOOR.glob("*.py"):
        for name in private_uses(path):
            if is_private(name):
                assert any(one == name or one.startswith(f"{name}.") for one in listed), f"{name} of {path.name}"


def entries():
    for module in (core, data, train):
        for name, found in vars(module).items():
            if not name.startswith("_") and getattr(found, "__module__", "") == module.__name__:
                yield pytest.param(found, id=f"{module.__name__.rpartition('.')[2]}.{name}")


@pytest.mark.parametrize("entry", list(entries()))
def test_an_entry_says_what_is_missing_and_with_which_versions_it_was_run(entry):
    said = " ".join(inspect.getdoc(entry).split())
    assert "Missing: " in said
    assert f"Run with Ray {admitted()}." in said


def test_the_names_were_run_with_the_versions_that_are_admitted():
    assert f"All were run with Ray {admitted()}." in names.__doc__


def admitted() -> str:
    """The versions of Ray that pyproject.toml admits, without their last numbers: "2.60", or "2.60 to 2.61"."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = next(r for r in map(Requirement, settings["project"]["dependencies"]) if r.name == "ray")
    bounds = {part.operator: part.version for part in needed.specifier}
    major, minor = bounds["<"].split(".")
    lowest, highest = ".".join(bounds[">="].split(".")[:2]), f"{major}.{int(minor) - 1}"
    return lowest if lowest == highest else f"{lowest} to {highest}"
