"""Ahead of time with TVM: a model as a bundle that runs without PyTorch."""
