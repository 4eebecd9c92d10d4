"""Overhead of Ray Tune: a sweep of short trainings, one at a time, compared with the same trainings as separate commands.

    python -m benchmarks.sweep_overhead --trials 3 --steps 40

Both start from an empty folder, and end with results on disk. The sweep also makes its verdict and report.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

WEIGHTS = (0.5, 1.5, 3.0, 0.0, 5.0, 1.0)  # GO-LSD weight of each trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    weights = WEIGHTS[: args.trials]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        experiment, cluster, sweep = files(folder, args.steps, weights)
        source = [
            "synthetic",
            "--images",
            "12",
            "--image-side",
            "128",
            "--split",
            "drawn",
            "--out",
            str(folder / "data"),
        ]
        command("jobs.prepare", *source)
        by_hand = []
        for number, weight in enumerate(weights):
            changes = [f"loss.ddf={weight}", f"storage={folder}/by_hand"]
            train = ["jobs.train", experiment, "--cluster", cluster, "--name", f"trial-{number}", "--set", *changes]
            by_hand.append(command(*train))
        swept = command("jobs.tune", sweep, "--cluster", cluster)
    print("by hand".ljust(24) + "".join(f"{seconds:8.1f}" for seconds in by_hand) + f"   in all {sum(by_hand):8.1f} s")
    print("as a sweep".ljust(24) + " " * 8 * len(by_hand) + f"   in all {swept:8.1f} s")
    print(f"the sweep takes {100 * (swept / sum(by_hand) - 1):+.1f} %")


def files(folder: Path, steps: int, weights: tuple[float, ...]) -> tuple[str, str, str]:
    content = {
        "experiment.yaml": {
            "data": {"train": str(folder / "data"), "val": str(folder / "data"), "decode_in": "worker"},
            "model": {"variant": "n", "input_size": [128, 128], "num_queries": 50},
            "schedule": {"steps": steps, "global_batch_size": 6, "no_aug_epochs": 0},
            "evaluation": {"every_steps": steps // 2, "num_images": 0},
        },
        "cluster.yaml": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1},
        "sweep.yaml": {
            "experiment": "experiment.yaml",
            "name": "sweep",
            "storage": str(folder / "swept"),
            "space": {"loss.ddf": {"grid": list(weights)}},
            "searcher": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "max_concurrent_trials": 1,
            "replicates": 0,
            "confirm": {"top": 0},
        },
    }
    for name, values in content.items():
        (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / "experiment.yaml"), str(folder / "cluster.yaml"), str(folder / "sweep.yaml")


def command(module: str, *arguments: str) -> float:
    """Run a module, and return its duration in seconds."""
    started_at = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
