"""Synthetic scenes with exact ground truth: COCO objects drawn from emoji artwork on varied backgrounds."""
