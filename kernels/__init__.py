"""Triton kernels, each beside its PyTorch reference. Installed as `fastsnap.kernels`; imports only torch and triton."""
