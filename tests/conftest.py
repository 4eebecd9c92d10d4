"""Shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch starts: tests must not depend on the machine's width

import torch

torch.set_num_threads(2)
