"""Makes the starter: the models and experts in `assets/starter`. Not part of what users install."""
