"""Kernels in Triton. Importing a module of this room needs triton; kernels/int8.py imports them when they run."""
