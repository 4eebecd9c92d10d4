"""Settings of a stream that an experiment's file may name; importing them loads neither NumPy nor pyarrow."""

from typing import Literal

DEFAULT_WINDOW_ROWS = 2048
# Decoding of pixels: in data tasks, on any node; in threads of the training worker; or in its own thread and without Ray,
# for one process, a debugger, a test.
DecodeIn = Literal["task", "worker", "inline"]
