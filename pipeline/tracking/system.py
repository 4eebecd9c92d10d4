"""Load of this node, under the names of MLflow's own monitor, so that the UI displays it on its system page."""

from functools import cache

import psutil
import pynvml  # type: ignore[import-untyped]

MEGABYTE = 1e6


def system_metrics() -> dict[str, float]:
    """Measure the node and all its GPUs at this moment; processor use is the mean since the last call.

    Logged together with the training's own metrics, and so under the same step. Takes about a millisecond.
    """
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_usage_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    for index, handle in enumerate(_gpus()):
        try:
            metrics |= {f"system/gpu_{index}_{name}": value for name, value in _gpu_metrics(handle).items()}
        except pynvml.NVMLError:
            continue  # a part of a GPU, or a driver, that does not report this
    return metrics


def _gpu_metrics(handle: object) -> dict[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_usage_megabytes": float(memory.used) / MEGABYTE,
        "memory_usage_percentage": 100 * float(memory.used) / float(memory.total),
        "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }


@cache
def _gpus() -> list[object]:
    """NVML's handles of all GPUs; none without a driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
