"""Tiny models of ComfyUI's own classes with random weights: a node pack for servers, functions for tests."""

from .transformers import TinyTransformerLoader
from .xl import TinyXLLoader

NODE_CLASS_MAPPINGS = {"TinyXLLoader": TinyXLLoader, "TinyTransformerLoader": TinyTransformerLoader}
