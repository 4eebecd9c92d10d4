"""What an idle Ray on this machine costs: CPU, memory and processes.

python -m benchmarks.idle_ray
"""

import time

import psutil
import ray

from pipeline.ray_cluster import start_ray

SETTLE_SECONDS = 15.0  # the processes of a new cluster are busy at first
MEASURED_SECONDS = 30.0


def main() -> None:
    """Measure a Ray without a dashboard, as for data, and one with it, as for trainings and sweeps."""
    print(f"{'':20}{'processes':>10}{'share of a core':>17}{'PSS':>12}")
    for dashboard in (False, True):
        start_ray(dashboard=dashboard)
        time.sleep(SETTLE_SECONDS)
        processes = psutil.Process().children(recursive=True)
        before = cpu_seconds(processes)
        time.sleep(MEASURED_SECONDS)
        share = (cpu_seconds(processes) - before) / MEASURED_SECONDS
        pss = sum(process.memory_full_info().pss for process in processes) / 2**20
        name = "with dashboard" if dashboard else "without dashboard"
        print(f"{name:20}{len(processes):>10}{share:>17.1%}{pss:>8.0f} MiB")
        for process in sorted(processes, key=lambda process: -process.memory_full_info().pss):
            title = " ".join(process.cmdline()).replace(ray.__path__[0], "ray")[:90]
            print(f"  {process.memory_full_info().pss / 2**20:6.0f} MiB, nice {process.nice():3}  {title}")
        ray.shutdown()


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU seconds of all processes."""
    times = [process.cpu_times() for process in processes if process.is_running()]
    return sum(each.user + each.system for each in times)


if __name__ == "__main__":
    main()
