"""Runs these tests in Triton's interpreter where there is no GPU: the switch must stand before a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
