"""The training loop, its state on disk and what it tells while it runs; knows nothing of pictures."""
