"""Experiments: comparisons of methods, and the paper's theory, measured."""
