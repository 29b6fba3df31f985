"""Triton kernels: device functions, kernels and launchers. Imports torch, triton and itself, nothing else."""
