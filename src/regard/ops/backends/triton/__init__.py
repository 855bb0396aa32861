"""Triton kernels: imported only where Triton is installed and asked for."""
