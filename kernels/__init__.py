"""The update and the averaging: for each a PyTorch reference, a C++ kernel for CPUs and a Triton kernel for GPUs.

Installed as `fastsnap.kernels`; imports only torch and, in the modules named *_triton and the report, triton.
"""
