"""One training loop, its objectives, batches and cached vision features.

Knows nothing of evaluation or serving. ``config`` is light; the other modules import torch.
"""
