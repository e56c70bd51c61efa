"""Kernels in C++ behind a plain C interface, for processors; optional: without a compiler PyTorch serves."""
