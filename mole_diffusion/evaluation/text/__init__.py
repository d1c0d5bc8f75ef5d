"""Evaluation of language models with experts: the paper's tables 3 to 8."""
