"""Measuring mixtures in pictures: protocols, the same seeds by every method, scores, tables and figures.

The command `mole evaluate` is a thin user of `run.evaluate`.
"""
