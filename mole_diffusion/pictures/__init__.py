"""Diffusion pipelines with experts, and the training of their gates."""
