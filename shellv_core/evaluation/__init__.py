"""Benchmarks, answers, scores, statistics and the report.

Scoring (`benchmarks`) is pure and light: no torch, no numpy. Only `generator` knows of models.
"""
