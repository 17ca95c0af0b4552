"""Figures to teach the decomposition with, one file each: `python -m analyses.teaching`."""
