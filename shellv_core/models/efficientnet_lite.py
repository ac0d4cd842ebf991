"""EfficientNet-Lite0 as a vision tower of transformers' LLaVA.

This file needs torch and transformers only. A copy of it lies in every model directory that uses this tower; importing
it once registers the architecture, and ``AutoModelForImageTextToText.from_pretrained`` then loads the directory.

Architecture: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (Apache 2.0). Parameter
names follow the PyPI package efficientnet-lite-pytorch 0.1.0 without its leading underscores.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling

# (repeats, kernel size, stride, expansion, output channels) of the stages 1 to 7.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
HEAD_STAGE = len(STAGES) + 1
# Strides and channels of the maps after each stage; the head (a 1x1 convolution) counts as stage 8.
STAGE_STRIDES = {1: 2, 2: 4, 3: 8, 4: 16, 5: 16, 6: 32, 7: 32, HEAD_STAGE: 32}
STAGE_CHANNELS = {**{index: stage[-1] for index, stage in enumerate(STAGES, start=1)}, HEAD_STAGE: HEAD_CHANNELS}


class EfficientNetLiteConfig(PreTrainedConfig):
    """Settings of the tower.

    Args:
        image_size: side of the square input in pixels, a multiple of 32.
        feature_stages: stages (1 to 8) whose maps are concatenated, channel-wise, into the image tokens.
        token_stride: pixels per token side; finer maps are folded (space to depth), coarser ones repeated.
    """

    model_type = "efficientnet_lite0"

    image_size: int = 160
    feature_stages: list[int] | tuple[int, ...] = (5, 7)
    token_stride: int = 32
    initializer_range: float = 0.02

    @property
    def hidden_size(self) -> int:
        """Channels of one image token."""
        folds = [max(self.token_stride // STAGE_STRIDES[stage], 1) for stage in self.feature_stages]
        return sum(STAGE_CHANNELS[stage] * fold**2 for stage, fold in zip(self.feature_stages, folds, strict=True))

    @property
    def patch_size(self) -> int:
        """Pixels per token side, by the name that LLaVA processors use."""
        return self.token_stride

    @property
    def num_tokens(self) -> int:
        """Image tokens per picture."""
        return (self.image_size // self.token_stride) ** 2


class _SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding (asymmetric for even inputs at stride 2)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pads = []
        for size, kernel, stride in zip(input.shape[:-3:-1], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(input, pads) if any(pads) else input)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=0.01, eps=1e-3)


class _InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        channels = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.bn0 = _batch_norm(channels)
        self.depthwise_conv = _SameConv2d(channels, channels, kernel_size, stride, groups=channels, bias=False)
        self.bn1 = _batch_norm(channels)
        self.project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn2 = _batch_norm(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        hidden = functional.relu6(self.bn1(self.depthwise_conv(hidden)))
        hidden = self.bn2(self.project_conv(hidden))
        return x + hidden if self.adds_input else hidden


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite0 that returns image tokens.

    ``hidden_states`` of its output has one entry of shape (batch, num_tokens, hidden_size), so a LLaVA config uses it
    with ``vision_feature_layer=-1`` and ``vision_feature_select_strategy="full"``. Each channel is standardized with
    the buffers ``feature_mean`` and ``feature_std`` (0 and 1 unless `set_standardization` was called). Batch
    normalization always uses its stored statistics: the tower is frozen in every stage.
    """

    config_class = EfficientNetLiteConfig
    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    main_input_name = "pixel_values"
    input_modalities = "image"
    # There is no attention, so whatever implementation the language model uses is fine.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        known = sorted(STAGE_STRIDES)
        if not config.feature_stages or any(stage not in known for stage in config.feature_stages):
            raise ValueError(f"feature_stages={config.feature_stages!r}: allowed are one or more of {known}.")
        if config.image_size % 32 or config.token_stride not in (8, 16, 32):
            raise ValueError(
                f"image_size={config.image_size} must be a multiple of 32, token_stride={config.token_stride} one of"
                " 8, 16, 32."
            )
        self.conv_stem = _SameConv2d(3, STEM_CHANNELS, 3, 2, bias=False)
        self.bn0 = _batch_norm(STEM_CHANNELS)
        self.blocks = nn.ModuleList()
        self._last_block_of_stage = {}
        channels = STEM_CHANNELS
        for stage, (repeats, kernel_size, stride, expansion, out_channels) in enumerate(STAGES, start=1):
            for repeat in range(repeats):
                block_stride = stride if repeat == 0 else 1
                self.blocks.append(_InvertedBottleneck(channels, out_channels, kernel_size, block_stride, expansion))
                channels = out_channels
            self._last_block_of_stage[len(self.blocks) - 1] = stage
        self.has_head = HEAD_STAGE in config.feature_stages
        if self.has_head:
            self.conv_head = nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False)
            self.bn1 = _batch_norm(HEAD_CHANNELS)
        self.register_buffer("feature_mean", torch.zeros(config.hidden_size))
        self.register_buffer("feature_std", torch.ones(config.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight)

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    def set_standardization(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Standardize every token with `mean` and `std`, both of shape (hidden_size,)."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def forward(self, pixel_values: torch.Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        """Map `pixel_values` (batch, 3, height, width) to tokens (batch, num_tokens, hidden_size)."""
        maps = {}
        # Channels last is 1.5 times as fast on CPU.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        x = functional.relu6(self.bn0(self.conv_stem(pixel_values)))
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self._last_block_of_stage:
                maps[self._last_block_of_stage[index]] = x
        if self.has_head:
            maps[HEAD_STAGE] = functional.relu6(self.bn1(self.conv_head(x)))
        tokens = torch.cat([self._to_tokens(maps[stage], stage) for stage in self.config.feature_stages], dim=-1)
        tokens = (tokens - self.feature_mean) / self.feature_std
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=tokens.mean(dim=1), hidden_states=(tokens,)
        )

    def _to_tokens(self, feature_map: torch.Tensor, stage: int) -> torch.Tensor:
        stride, token_stride = STAGE_STRIDES[stage], self.config.token_stride
        if stride < token_stride:
            feature_map = functional.pixel_unshuffle(feature_map, token_stride // stride)
        elif stride > token_stride:
            repeats = stride // token_stride
            feature_map = feature_map.repeat_interleave(repeats, dim=2).repeat_interleave(repeats, dim=3)
        return feature_map.flatten(2).transpose(1, 2)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
