"""TVM TIR kernels for NVIDIA GPUs, from compute capability 8.0."""
