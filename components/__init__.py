"""The seven Kubeflow components: each imports its stage of `shellv_core` inside its body and runs it.

Knows nothing of training, models or storage. Nothing but kfp is imported at module scope, so that compiling stays
light and the image, not the compiling machine, decides which library runs.
"""
