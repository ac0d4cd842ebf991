"""Shell-V: train, judge and serve vision-language models that hallucinate less."""

__version__ = "0.1.0"
