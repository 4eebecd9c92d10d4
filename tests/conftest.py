"""Shared by all tests."""

import os

# Before torch starts: tests must not depend on the machine's width, and idle threads must leave the cores to other processes.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(2)
