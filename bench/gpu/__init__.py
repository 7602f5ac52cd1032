"""Kernels and launches of GPUs, on a machine with one or without."""
