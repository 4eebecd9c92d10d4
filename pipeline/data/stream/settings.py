"""Settings of a stream that an experiment's file may name; importing them loads neither NumPy nor pyarrow."""

from typing import Literal

DEFAULT_WINDOW_ROWS = 2048  # over all lanes
MIN_LANE_ROWS = 128  # per window of a lane: several row groups, so that few are read twice
# Where images are decoded: in data tasks on any node; in threads of the training worker; or in the calling thread without
# Ray, for one process, a debugger, a test.
DecodeIn = Literal["task", "worker", "inline"]
