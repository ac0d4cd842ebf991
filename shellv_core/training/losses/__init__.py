"""Objectives beside the generation loss, as functions of tensors.

``hacl`` and ``preference`` know nothing of models, batches or processes; ``gather`` joins what several processes hold,
``queue`` keeps what earlier steps held, ``schedule`` gives the weight of a step.
"""
