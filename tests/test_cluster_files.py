"""Files for other programs: as valid as can be known here."""

import json
import shlex
from pathlib import Path

import jsonschema
import ray
import yaml

from jobs.train import parser

CLUSTERS = Path(__file__).parent.parent / "configs" / "clusters"


def test_the_ray_up_file_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load((CLUSTERS / "ray_up_aws.yaml").read_text())
    jsonschema.validate(content, schema)
    assert content["head_node_type"] in content["available_node_types"]


def test_the_rayjob_runs_a_command_that_there_is_with_files_that_there_are() -> None:
    job = yaml.safe_load((CLUSTERS / "kuberay_rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    python, dash_m, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module) == ("python", "-m", "jobs.train")
    args = parser().parse_args(arguments)
    assert args.experiment.exists()
    assert args.cluster.exists()
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"]
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    asked = yaml.safe_load(args.cluster.read_text())
    container = worker["template"]["spec"]["containers"][0]
    assert worker["maxReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"]) == asked["workers"]
