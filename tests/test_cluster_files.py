"""Files for other programs: as valid as can be known here."""

import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.train import parser

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "configs" / "clusters"
RAY_UP, RAYJOB = CLUSTERS / "ray_up_aws.yaml", CLUSTERS / "kuberay_rayjob.yaml"
IMAGE = "REGISTRY/ray-dfine:latest"  # the Dockerfile's first lines build it

QUANTITIES = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "image", "resources"],
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"requests": QUANTITIES, "limits": QUANTITIES},
        },
        "envFrom": {"type": "array"},
        "volumeMounts": {"type": "array", "items": {"type": "object", "required": ["name", "mountPath"]}},
    },
}
POD_TEMPLATE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["containers"],
            "properties": {
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            },
        }
    },
}
START_PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}  # a number without quotes is refused
# Fields of KubeRay 1.5.1 that the file may use, with their types: a part of its resource definition of RayJob.
RAYJOB_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 47, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["entrypoint", "rayClusterSpec"],
            "properties": {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "backoffLimit": {"type": "integer", "minimum": 0},
                "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
                "runtimeEnvYAML": {"type": "string"},
                "rayClusterSpec": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["headGroupSpec", "workerGroupSpecs"],
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"mode": {"enum": ["disabled", "token"]}},
                        },
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "headGroupSpec": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["template"],
                            "properties": {"rayStartParams": START_PARAMS, "template": POD_TEMPLATE},
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": {"type": "integer", "minimum": 0},
                                    "minReplicas": {"type": "integer", "minimum": 0},
                                    "maxReplicas": {"type": "integer", "minimum": 1},
                                    "rayStartParams": START_PARAMS,
                                    "template": POD_TEMPLATE,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def ray_up() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(RAY_UP.read_text())
    return content


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(RAYJOB.read_text())
    return content


@pytest.fixture(scope="module")
def node_types(rayjob: dict[str, Any]) -> dict[str, Any]:
    """Node types as Ray's autoscaler reads them out of the Kubernetes job."""
    cluster = {"metadata": {"name": "dfine", "namespace": "default"}, "spec": rayjob["spec"]["rayClusterSpec"]}
    read: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return read


def several_nodes() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTERS / "several_nodes.yaml").read_text())
    return content


def fits(node: dict[str, Any], nodes: int) -> bool:
    """Whether nodes of a kind hold the workers of several_nodes.yaml, and a core for decoding each."""
    asked = several_nodes()
    workers = node["GPU"] // asked["gpus_per_worker"]
    return bool(nodes * workers == asked["workers"] and node["CPU"] >= workers * asked["cpus_per_worker"] + 1)


def test_the_ray_up_file_is_accepted_by_ray(ray_up: dict[str, Any]) -> None:
    validate_config(prepare_config(ray_up))
    broken = {**ray_up, "docker": {**ray_up["docker"], "images": IMAGE}}
    with pytest.raises(jsonschema.ValidationError, match="images"):
        validate_config(prepare_config(broken))


def test_ray_up_installs_nothing_on_top_of_the_image(ray_up: dict[str, Any]) -> None:
    complete = prepare_config(ray_up)  # Ray's own defaults are pip commands
    assert (complete["head_setup_commands"], complete["worker_setup_commands"]) == ([], [])
    assert complete["docker"]["image"] == IMAGE
    assert f"docker build --tag {IMAGE} ." in (ROOT / "Dockerfile").read_text()


def test_every_machine_of_the_ray_up_file_has_an_image_and_may_read_the_bucket(ray_up: dict[str, Any]) -> None:
    for node in ray_up["available_node_types"].values():
        assert {"InstanceType", "ImageId", "IamInstanceProfile"} <= node["node_config"].keys()


def test_the_ray_up_file_holds_the_workers_of_its_cluster_file(ray_up: dict[str, Any]) -> None:
    gpu = ray_up["available_node_types"]["gpu"]
    assert "--cluster configs/clusters/several_nodes.yaml" in RAY_UP.read_text()
    assert ray_up["max_workers"] == gpu["max_workers"]
    assert fits(gpu["resources"], gpu["max_workers"])
    assert not fits(gpu["resources"], gpu["max_workers"] - 1)


def test_the_rayjob_has_only_fields_of_the_named_kuberay(rayjob: dict[str, Any]) -> None:
    assert "KubeRay operator (1.5.1 or newer" in RAYJOB.read_text()
    jsonschema.validate(rayjob, RAYJOB_SCHEMA)
    head = {**rayjob["spec"]["rayClusterSpec"]["headGroupSpec"], "rayStartParams": {"num-cpus": 0}}
    broken = {**rayjob["spec"], "rayClusterSpec": {**rayjob["spec"]["rayClusterSpec"], "headGroupSpec": head}}
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate({**rayjob, "spec": broken}, RAYJOB_SCHEMA)


def test_rays_autoscaler_reads_the_nodes_of_the_rayjob(node_types: dict[str, Any]) -> None:
    assert node_types["headgroup"]["resources"]["CPU"] == 0
    gpu = node_types["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (8, 8)
    assert fits(gpu["resources"], gpu["max_workers"])


def test_the_rayjob_runs_a_command_that_there_is_with_files_that_there_are(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    python, dash_m, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, dash_m, module) == ("python", "-m", "jobs.train")
    args = parser().parse_args(arguments)
    assert args.experiment.exists()
    assert args.cluster == Path("configs/clusters/several_nodes.yaml")
    assert f"WORKDIR {yaml.safe_load(spec['runtimeEnvYAML'])['working_dir']}\n" in (ROOT / "Dockerfile").read_text()


def test_every_pod_of_the_rayjob_runs_the_image_and_mounts_volumes_that_there_are(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    containers = [(container, pod) for pod in pods for container in pod["containers"]]
    assert len(containers) == 2
    for container, pod in containers:
        assert container["image"] == IMAGE
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
