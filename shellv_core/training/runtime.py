"""How a run computes: memory for time, compiled layers, TF32, determinism. Switched on around it, and off again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shellv_core.errors import TrainingError
from shellv_core.training.attention import ATTENTION_NAME, documents_attention
from shellv_core.training.config import TrainingConfig

CUBLAS_VARIABLE, CUBLAS_VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextlib.contextmanager
def runtime(model: LlavaForConditionalGeneration, config: TrainingConfig) -> Iterator[None]:
    """Within it, `model` is trained as `config` says; adapters are in place already. All is as before afterwards.

    For `config.deterministic` enter it before the process's first work on a GPU: cuBLAS reads its setting only then.

    Raises:
        TrainingError: if the language model has no layers that can be checkpointed or compiled.
    """
    language_model = model.model.language_model
    with contextlib.ExitStack() as stack:
        stack.enter_context(_tf32(config.tf32))
        if config.deterministic:
            stack.enter_context(_deterministic())
        if config.gradient_checkpointing:
            stack.enter_context(_checkpointing(language_model))
        if config.compile:
            stack.enter_context(_compiled(language_model))
        yield


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(CUBLAS_VARIABLE)
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_VALUE)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[CUBLAS_VARIABLE]


@contextlib.contextmanager
def _checkpointing(language_model: PreTrainedModel) -> Iterator[None]:
    _layers(language_model)
    language_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant checkpoints need inputs that require gradients; for others it is work for nothing.
    language_model.disable_input_require_grads()
    try:
        yield
    finally:
        language_model.activation_checkpointing_disable()


@contextlib.contextmanager
def _compiled(language_model: PreTrainedModel) -> Iterator[None]:
    layers = _layers(language_model)
    for layer in layers:
        layer.compile(dynamic=True)
    # What packed attention does is other for every pack, and would be compiled anew for each.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(documents_attention))
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, documents_attention)
        for layer in layers:
            layer._compiled_call_impl = None


def _layers(language_model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    layers = [each for each in language_model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(
            f"{type(language_model).__name__} has no layers that transformers can checkpoint; set"
            " training.gradient_checkpointing=false and training.compile=false."
        )
    return layers
