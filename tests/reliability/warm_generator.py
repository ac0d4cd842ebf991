"""A generator with all that it imports: made once, in the process that others are forked from."""

import torch

from shellv_core.evaluation.generator import LlavaGenerator
from tests.evaluation.tiny_llava import build_tiny_llava

torch.set_num_threads(1)
GENERATOR = LlavaGenerator(*build_tiny_llava(), batch_size=3)
