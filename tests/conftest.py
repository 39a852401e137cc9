"""Settings every test needs before Triton or torch is imported."""

import os

# Triton decides when a kernel is *defined* whether it is interpreted, so this must precede every import.
# The compiled-code checks run in processes of their own with the variable removed.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
