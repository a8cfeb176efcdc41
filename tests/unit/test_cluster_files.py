"""The files in cluster/ against the schemas of those who read them, and against what they promise."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

import raybert
from raybert.cluster import LIMITS, MARKET_TYPE, limits_of

ROOT = Path(raybert.__file__).parents[1]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas"
MANIFESTS = {"RayCluster": ("raycluster", "rayclusters"), "RayJob": ("rayjob", "rayjobs")}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))


def manifest(kind: str) -> dict[str, Any]:
    return next(document for document in documents(MANIFESTS[kind][0]) if document["kind"] == kind)


@pytest.fixture(scope="module")
def gcp() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "gcp.yaml").read_text())


@pytest.fixture(scope="module")
def pods() -> dict[str, dict[str, Any]]:
    """Group name -> group, the head's included."""
    spec = manifest("RayCluster")["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def strict(schema: Any) -> Any:
    """The same OpenAPI schema, refusing keys that it does not list, as Kubernetes does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if closed.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in closed and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def validate(kind: str, document: dict[str, Any]) -> None:
    path = SCHEMAS / f"ray.io_{MANIFESTS[kind][1]}.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's schema {path} is not there")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of 2 MB; in Python it takes six seconds
    versions = yaml.load(path.read_text(), Loader=loader)["spec"]["versions"]
    schema = strict(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"))
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the schema leaves open
    jsonschema.Draft7Validator(schema).validate(document)


def test_ray_accepts_the_gcp_file(gcp):
    validate_config(prepare_config(gcp))
    assert limits_of(gcp) == {"CPU": 4 * 8 + 8 * 8, "GPU": 8}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_manifests_fit_kuberays_schemas(kind):
    validate(kind, manifest(kind))
    misspelt = manifest(kind)
    misspelt["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError):
        validate(kind, misspelt)


def test_rays_autoscaler_reads_the_manifest_and_the_head_states_its_limits(pods):
    derived = _derive_autoscaling_config_from_ray_cr(manifest("RayCluster"))
    assert derived["available_node_types"]["gpu-spot"]["labels"] == {MARKET_TYPE: "spot"}
    head = pods["head"]["template"]["spec"]["containers"][0]
    (stated,) = [variable["value"] for variable in head["env"] if variable["name"] == LIMITS]
    assert json.loads(stated) == limits_of(derived)


def test_groups_start_at_zero_and_only_the_gpu_group_is_spot(gcp, pods):
    for name, node_type in gcp["available_node_types"].items():
        spot = node_type["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert node_type.get("min_workers", 0) == 0
        assert spot == (node_type.get("labels", {}).get(MARKET_TYPE) == "spot") == (name == "gpu-spot"), name
    for name, group in pods.items():
        spec = group["template"]["spec"]
        spot = spec.get("nodeSelector", {}).get("cloud.google.com/gke-spot") == "true"
        tolerated = any(each["key"] == "cloud.google.com/gke-spot" for each in spec.get("tolerations", []))
        assert group.get("minReplicas", 0) == 0
        assert spot == tolerated == (group.get("labels", {}).get(MARKET_TYPE) == "spot") == (name == "gpu-spot"), name
    # The head has no CPUs to give to data tasks; drivers and the probe service ask for none.
    assert gcp["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert pods["head"]["rayStartParams"]["num-cpus"] == "0"


def test_pods_are_confined_sized_and_watched(pods):
    for name, group in pods.items():
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert not container["securityContext"]["allowPrivilegeEscalation"], name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"]["limits"].keys()
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), name
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in spec["volumes"]}
        assert volumes[mounts["/dev/shm"]]["medium"] == "Memory", name


def test_a_token_is_asked_for_and_nobody_outside_is_let_in(gcp, pods):
    assert "-e RAY_AUTH_MODE=token" in gcp["docker"]["run_options"]
    assert "~/.ray/auth_token" in gcp["file_mounts"]
    assert any("--dashboard-host=127.0.0.1" in command for command in gcp["head_start_ray_commands"])
    spec = manifest("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "raybert-token"}
    assert pods["head"]["serviceType"] == "ClusterIP"
    (policy,) = documents("networkpolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": spec_name()}
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "a rule without a source lets everybody in"
        assert all("ipBlock" not in source for source in rule["from"])
        inside = [source for source in rule["from"] if "ray.io/cluster" in source["podSelector"]["matchLabels"]]
        assert inside or rule["ports"], "others than the cluster's pods get named ports alone"


def spec_name() -> str:
    return manifest("RayCluster")["metadata"]["name"]


def test_no_file_holds_a_secret():
    secret = re.compile(
        r"PRIVATE KEY|AIza[\w-]{35}|ya29\.|(token|password|secret)\w*\s*[:=]\s*['\"]?[0-9a-zA-Z+/]{20,}"
    )
    pages = [ROOT / "docs" / name for name in ("cluster.md", "google-cloud.md", "kubernetes.md")]
    for path in [*CLUSTER.rglob("*.*"), ROOT / "Dockerfile", *(ROOT / "jobs").iterdir(), *pages]:
        assert not secret.search(path.read_text()), path


def test_the_versions_are_the_tested_ones(gcp):
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert str(manifest("RayCluster")["spec"]["rayVersion"]) == pinned["ray"]
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    images = re.findall(r"REGISTRY/raybert:(\S+)", "".join(path.read_text() for path in CLUSTER.rglob("*.yaml")))
    assert set(images) == {f"{version[1]}-cpu", f"{version[1]}-cuda"}


def test_a_job_leaves_the_cluster_alone():
    """The operator deletes the cluster that a job selects when it tries the job again, and refuses a time to live."""
    spec = manifest("RayJob")["spec"]
    assert spec["clusterSelector"]
    assert not {"backoffLimit", "ttlSecondsAfterFinished"} & set(spec)


def test_no_placeholder_is_left_by_the_commands_of_the_docs():
    page = "".join((ROOT / "docs" / name).read_text() for name in ("google-cloud.md", "kubernetes.md"))
    for name in ("gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"):
        (command,) = re.findall(rf"^ *(sed .*) cluster/{re.escape(name)}", page, re.MULTILINE)
        text = (ROOT / "cluster" / name).read_text()
        for placeholder, variable in re.findall(r"s\|(\w+)\|\$(\w+)\|g", command):
            assert placeholder == variable
            text = text.replace(placeholder, "x")
        left = re.findall(r"\b(?:PROJECT|REGISTRY|BUCKET)\b", re.sub(r"(?m)#.*$", "", text))
        assert not left, f"{name}: {left}"


def test_the_image_says_where_its_home_is():
    """`ray up` mounts the token below it."""
    last = (ROOT / "Dockerfile").read_text().rpartition("FROM ")[2]
    assert "HOME=/home/raybert" in last
