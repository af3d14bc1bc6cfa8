"""CUDA C++ kernels as source (*.cu, *.cuh), and the one file that compiles, caches and launches them."""
