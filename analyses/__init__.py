"""Recipes: each one screen, run as `python -m analyses.NAME`, drawing into `figures/`."""
