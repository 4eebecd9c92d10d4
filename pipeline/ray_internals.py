"""Everything in this project that depends on private modules of Ray, verified with Ray 2.60.

A new release of Ray may move or change any of this without notice. `tests/test_ray_internals.py` checks the version and every
name, and that no other file imports a private module. `ray_data_logging.yaml` names two private classes in addition.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from ray.data import DataContext, DataIterator, Dataset
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ConcurrencyCapBackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.data._internal.execution.streaming_executor_state import Topology
from ray.data._internal.iterator.stream_split_iterator import SplitCoordinator, StreamSplitDataIterator
from ray.data._internal.logging import configure_logging
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import StreamingSplit

ADMISSION = "ray_dfine.admission"  # key of the DataContext
NODE_ID_LABEL = "ray.io/node-id"  # that Ray gives every node


class Admission(Protocol):
    """Decides whether an operator of a running Ray Data pipeline may start another task."""

    def may_start_task(self, operator: str, stored_bytes: Callable[[], int], idle: Callable[[], bool]) -> bool:
        """Decide for one operator; called in a loop by Ray Data's scheduler.

        Args:
            operator: its name, such as "MapBatches(decode)".
            stored_bytes: returns the bytes of the operator's output that still occupy the object store.
            idle: returns whether no task of any operator is running.
        """
        ...


def use_admission(context: DataContext, admission: Callable[[list[str]], Admission]) -> None:
    """Replace Ray Data's backpressure, except for the sizes of task pools.

    Args:
        admission: builds the rule from the names of a pipeline's operators; must be picklable.
    """
    context.op_resource_reservation_enabled = False
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [ConcurrencyCapBackpressurePolicy, AdmissionPolicy])
    context.set_config(ADMISSION, admission)


class AdmissionPolicy(BackpressurePolicy):
    """Holds back the start of tasks, never their output: the task at the head of the order can always deliver."""

    def __init__(self, data_context: DataContext, topology: Topology, resource_manager: ResourceManager) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._topology = topology
        self._admission: Admission = data_context.get_config(ADMISSION)([op.name for op in topology])

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Implement Ray's interface."""
        return self._admission.may_start_task(op.name, op.estimate_object_store_usage, self._idle)

    def _idle(self) -> bool:
        return all(op.num_active_tasks() == 0 for op in self._topology)


def split_on_node(dataset: Dataset, count: int, node: str) -> list[DataIterator]:
    """Split a dataset as `dataset.streaming_split(count, equal=True)` does, with the coordinator on another node than this one.

    Args:
        node: its id.
    """
    split = StreamingSplit(
        num_splits=count, equal=True, input_dependencies=[dataset._logical_plan.dag], locality_hints=None
    )
    split_dataset = Dataset._from_parent(dataset, LogicalPlan(split, dataset.context))
    split_dataset._set_uuid(dataset._uuid)
    actor: Any = SplitCoordinator
    coordinator = actor.options(max_concurrency=count + 1, label_selector={NODE_ID_LABEL: node}).remote(
        split_dataset, count, None
    )
    return [StreamSplitDataIterator(coordinator, index, count) for index in range(count)]


def reload_data_logging() -> None:
    """Apply the environment's RAY_DATA_LOGGING_CONFIG, which `ray.data` reads only when it is imported."""
    for handler in logging.getLogger("ray.data").handlers:
        handler.close()  # Ray drops its handlers with their files open
    configure_logging()


def drop_placement_group_cleaner(trainer: Any) -> None:
    """Keep a Ray Train trainer from asking the dashboard once a second whether its controller is alive.

    It asks in order to free the resources of a controller that died. A cluster that ends with its driver has nothing to free.
    """
    # Imported here: data tasks must not wait for Ray Train.
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    create = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [
        c for c in create() if not isinstance(c, PlacementGroupCleanerCallback)
    ]


def keep_signal_handlers(trainer: Any) -> None:
    """Keep a Ray Train trainer from handling Ctrl-C: it would end the workers at once, and leave its handler behind."""
    assert callable(trainer._register_sigint_handler)
    trainer._register_sigint_handler = lambda controller: None  # noqa: ARG005 - Ray's signature


def silence_train_loggers() -> None:
    """Drop two kinds of log lines from Ray Train's workers: one for each report, one for each broadcast above 1 kB."""
    # Imported here: data tasks must not wait for Ray Train.
    from ray.train.v2._internal.execution import collective_impl, context

    logging.getLogger(context.__file__).setLevel(logging.WARNING)  # Ray names this logger after the file
    logging.getLogger(collective_impl.__name__).setLevel(logging.ERROR)
