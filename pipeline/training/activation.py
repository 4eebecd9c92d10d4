"""Activation of a run's detector: the one that its initial weights were trained with, unless the experiment names it.

An activation has no parameters, so weights of D-FINE (ReLU) load into the network of DEIM (SiLU) without an error, and compute
something else.
"""

from pipeline.config import ConfigError, Experiment
from pipeline.pretrained import table
from pipeline.recipes import ACTIVATION
from pipeline.training.init_weights import activation_of


def with_activation(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """Settle `model.activation` where it is not given.

    Args:
        experiment: its `init`, if it has one, is a path or URI, or a name in the table of published weights.

    Returns:
        The experiment, and a line where somebody could wonder.

    Raises:
        ConfigError: the initial weights do not name their activation, and the recipe has another one than D-FINE.
    """
    source, given = experiment.init, experiment.model.activation
    if source is None:
        return experiment, []
    is_detector, found = _read(source)
    of_recipe = ACTIVATION[experiment.recipe]
    lines: list[str] = []
    if not is_detector:
        settled = given or of_recipe
    elif found is not None:
        settled = given or found
        if settled != found:
            lines = [
                f"the initial weights were trained with {found}, and model.activation is {settled}: they fit badly"
            ]
        elif settled != of_recipe:
            lines = [
                f"activation {settled}, as the initial weights were trained with it; recipe {experiment.recipe} has {of_recipe}"
            ]
    elif given is not None or of_recipe == "relu":
        settled = given or of_recipe
        hint = "" if given else "; for weights of DEIM set model.activation to silu"
        lines = [f"{source} does not name the activation of its weights: taken as {settled}{hint}"]
    else:
        raise ConfigError(
            f"init: {source} holds weights alone, and D-FINE's (relu) cannot be told from DEIM's (silu): set model.activation to"
            " the one that they were trained with"
        )
    model = experiment.model.model_copy(update={"activation": settled})
    return experiment.model_copy(update={"model": model}), lines


def _read(source: str) -> tuple[bool, str | None]:
    if source in table():  # nothing is fetched for a dry run: its detectors are D-FINE's, the others are backbones
        return source.startswith("dfine-"), "relu"
    return activation_of(source)
