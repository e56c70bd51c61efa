"""Kernels in Triton, for GPUs; under Triton's interpreter they run on processors, for tests."""
