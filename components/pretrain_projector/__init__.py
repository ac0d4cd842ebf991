"""The pretrain_projector component."""
