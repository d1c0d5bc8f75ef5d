"""Measuring mixtures, whatever they make: results, statistics, tables, charts and the run of any domain.

`evaluation.pictures` draws and scores pictures. Needs the extra `evaluate`.
"""
