"""Quantise once: one representation, recipes as data, row by row, for every target."""
