"""Model versions made after the fact, of runs that have logged their model."""

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.config import ConfigError
from pipeline.tracking.asking import asking
from pipeline.tracking.lineage import client_of


def register(tracking_uri: str, run_id: str, name: str, alias: str | None = None) -> str:
    """The version of the registered model `name` that is the run's detector, as NAME/VERSION; made if there is none.

    Raises:
        ConfigError: the run has logged no model, or MLflow does not take it.
    """
    with asking(f"registering {name}"):
        return _register(client_of(tracking_uri), run_id, name, alias)


def _register(client: MlflowClient, run_id: str, name: str, alias: str | None) -> str:
    outputs = client.get_run(run_id).outputs
    if outputs is None or not outputs.model_outputs:
        raise ConfigError(f"run {run_id} has logged no model")
    model = client.get_logged_model(outputs.model_outputs[-1].model_id)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    version = (
        known[0]
        if known
        else client.create_model_version(
            name, model.artifact_location, run_id, model_id=model.model_id, await_creation_for=0
        )
    )
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
    return f"{name}/{version.version}"
