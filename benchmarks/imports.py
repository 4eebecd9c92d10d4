"""CPU seconds of importing the modules of each kind of process.

    python -m benchmarks.imports --rounds 3

Each import happens in a process of its own with compiled bytecode; the minimum of the rounds. Packages that each kind
does without are held by `tests/test_process_imports.py`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Modules that a process of this kind imports.
MODULES = {
    "map task": ("pipeline.data.stream.tasks",),
    "task of prepare": ("pipeline.data.prepare.shard_writer", "pipeline.data.prepare.image_files"),
    "progress board": ("pipeline.training.heartbeat",),
    "driver": ("pipeline.training.launch",),
    "training in one process": ("pipeline.training.in_process", "pipeline.training.loop"),
    "training worker": ("pipeline.training.worker", "pipeline.training.loop"),
    "coordinator of the stream": ("pipeline.data.stream.groups",),
    "prediction": ("pipeline.predict.predict",),
    "worker of a prediction": ("pipeline.predict.partition",),
    "decoder of the server": ("pipeline.serve.decoding",),
}
IMPORT = """
import importlib, json, sys, time
started_at = time.process_time()
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
print(time.process_time() - started_at)
"""


def cpu_seconds(modules: tuple[str, ...]) -> float:
    """CPU time of importing them in a new process."""
    command = [sys.executable, "-c", IMPORT, json.dumps(modules)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(argv).rounds
    for kind, modules in MODULES.items():
        cpu_seconds(modules)  # compiles bytecode
        print(f"{kind:28}{min(cpu_seconds(modules) for _ in range(rounds)):6.2f} s", flush=True)


if __name__ == "__main__":
    main()
