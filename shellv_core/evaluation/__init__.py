"""Benchmarks, answers, scores, statistics and the report.

Scoring (`pope`, `hal_eval`, `chair`) is pure and light: no torch, no numpy. Only `generator` knows of models.
"""
