"""All commands by the modules that hold them, and the environment of a submitted job."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SHARED = {"__init__", "__main__", "command", "image_inputs", "recipes"}  # modules of `jobs` that are no command
COMMAND_MODULES = {path.stem for path in (ROOT / "jobs").glob("*.py")} - SHARED
JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "raysubmit_1"}}'}
