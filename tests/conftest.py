"""Stands here so that pytest puts tests/ on the import path: every room's tests import architectures.py from it.

Without a GPU, Triton's kernels run in its interpreter; the switch must stand before anything imports triton.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
