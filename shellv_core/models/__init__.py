"""LLaVA models: stock ``LlavaForConditionalGeneration`` composed of a vision tower, a projector and a language model.

Knows nothing of data, training, storage or tracking. ``config`` is light; the other modules import torch.
"""
