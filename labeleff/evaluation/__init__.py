"""Prediction of whole cases, metrics with a declared rule for misses, tables."""
