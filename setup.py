"""Packages of the distribution; everything else is in pyproject.toml.

The YAML files of `configs/` are installed as `jobs/configs`, so that `dfine train coco/dfine_s.yaml` works from any folder.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dfine_core*", "pipeline*", "jobs*"]), "jobs.configs"],
    package_dir={"jobs.configs": "configs"},
)
