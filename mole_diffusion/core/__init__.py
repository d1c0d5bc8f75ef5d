"""Experts, gates and their attachment to networks. Needs torch and safetensors only."""
