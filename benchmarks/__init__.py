"""Figures and comparisons, run by hand."""
