"""Folders; tests set them."""

models_path = ""
data_path = ""
