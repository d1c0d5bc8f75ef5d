"""Measuring mixtures: protocols, pictures by every method on the same seeds, metrics, tables and figures.

Needs the extra `evaluate`. The command `mole evaluate` is a thin user of `run.evaluate`.
"""
