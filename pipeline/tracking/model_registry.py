"""Versions of registered models: one for every logged model at most, whoever registers it and however often."""

from typing import TYPE_CHECKING

from pipeline.tracking.client import RunLookupError, connect, logged_model_id, mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


def register(tracking_uri: str, run_id: str, name: str, alias: str | None = None) -> str:
    """Register the model that a run has logged; return NAME/VERSION.

    Raises:
        RunLookupError: the run has logged no model, or the server does not accept it.
    """
    with mlflow_errors(f"registering {name}"):
        client = connect(tracking_uri)
        model_id = logged_model_id(client.get_run(run_id))
        if model_id is None:
            raise RunLookupError(f"run {run_id} has logged no model")
        version = register_model(client, client.get_logged_model(model_id), run_id=run_id, name=name, alias=alias)
    return f"{name}/{version}"


def register_model(client: "MlflowClient", model: "LoggedModel", *, run_id: str, name: str, alias: str | None) -> str:
    """Make a logged model a version of the registered model `name`, unless it is one already; return the version.

    Exceptions are MLflow's own.

    Args:
        alias: made to point to the version.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = model.artifact_location  # `models:/m-...` MLflow would look up at the process's default server
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    version = next((known for known in versions if known.source == source), None)
    if version is None:
        version = client.create_model_version(name, source, run_id, model_id=model.model_id, await_creation_for=0)
    if alias:
        client.set_registered_model_alias(name, alias, str(version.version))
    return str(version.version)
