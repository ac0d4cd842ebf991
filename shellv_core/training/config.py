"""Settings of the training loop and of the contrastive objective."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from shellv_core.config import Config

Part = Literal["projector", "language_model"]


class HaclConfig(Config):
    """The contrastive objective beside the generation loss."""

    #: Weight of the objective beside the generation loss; 0 leaves it out. Its formulas are in `training.losses.hacl`.
    weight: float = Field(default=0.0, ge=0.0)
    #: constant; linear: the weight rises from 0 over the warm-up and stays; cosine: from there it falls to 0.
    weight_schedule: Literal["constant", "linear", "cosine"] = "constant"
    #: Share of the steps over which the weight rises; for linear and cosine.
    weight_warmup_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    #: paired: an image is contrasted with its own hallucinated captions; batch: with all of the batch. Those in the
    #: queue count for every image either way, as the queue's captions do.
    negatives: Literal["paired", "batch"] = "batch"
    #: Hallucinated captions per image and step; they take turns where an image has more.
    num_hallucinated: int = Field(default=1, ge=0)
    #: linear: a linear head each for images and texts, to a quarter of the hidden size (as in the released code); none:
    #: hidden states are compared themselves (as in the paper).
    heads: Literal["linear", "none"] = "linear"
    #: Texts of earlier steps (captions and hallucinated captions) that stay negatives, and as many images; 0 for none.
    #: The paper has 16384.
    queue_size: int = Field(default=0, ge=0)
    #: With several processes, contrast each one's images with the texts of all; false: with its own only.
    gather: bool = True
    #: Weight of telling hallucinated captions from their own truths, where they have one (`HallucinatedCaption.truth`).
    #: 0 has them told from the image's caption, as all others are.
    truth_weight: float = Field(default=0.5, ge=0.0)
    #: Weight of keeping a hallucinated caption's text apart from its caption's (or truth's) by `text_margin`; 0: none.
    text_margin_weight: float = Field(default=0.0, ge=0.0)
    #: In cosine distance, where 1 is orthogonal.
    text_margin: float = Field(default=0.2, ge=0.0, le=2.0)
    #: Of the heads and the temperature, which is learned within 0.001..0.5 from 0.07 and does not decay.
    learning_rate: float = Field(default=1e-3, gt=0.0)

    @model_validator(mode="after")
    def _check(self) -> HaclConfig:
        if self.weight_schedule == "constant" and self.weight_warmup_ratio:
            raise ValueError(
                f"weight_warmup_ratio={self.weight_warmup_ratio} needs weight_schedule=linear or cosine; a constant"
                " weight has no warm-up"
            )
        if self.weight_schedule == "linear" and not self.weight_warmup_ratio:
            raise ValueError("weight_schedule=linear is a warm-up; give weight_warmup_ratio above 0, or constant")
        if self.queue_size and not self.gather:
            raise ValueError(
                "queue_size needs gather=true: the queue is one part of the training state, and without gather every"
                " process would hold another"
            )
        if self.text_margin_weight and not self.num_hallucinated:
            raise ValueError("text_margin_weight needs hallucinated captions; give num_hallucinated above 0")
        if self.text_margin_weight and not self.text_margin:
            raise ValueError("text_margin_weight has no effect with text_margin=0; give a margin or no weight")
        return self


class PreferenceConfig(Config):
    """A preference of captions over hallucinated captions, after mDPO; see `training.losses.preference`.

    One pair per image and step: the hallucinated caption whose turn it is, and its truth or else the image's caption.
    """

    #: Weight of the objective beside the generation loss; 0 leaves it out.
    weight: float = Field(default=0.0, ge=0.0)
    #: How strongly the model is tied to the one that it started from; larger is closer.
    beta: float = Field(default=0.1, gt=0.0)
    #: Weight of preferring the caption with its image over the caption with another image of the batch or
    #: pack.
    image_weight: float = Field(default=1.0, ge=0.0)
    #: Weight of keeping the caption's reward above `anchor`.
    anchor_weight: float = Field(default=1.0, ge=0.0)
    anchor: float = 0.0
    #: What the user asks, beside the image, to get a caption.
    prompt: str = Field(default="Describe the image.", min_length=1)


class AlignmentConfig(Config):
    """Word alignment of the projector, for language models without pretraining; see `training.alignment`."""

    epochs: int = Field(default=6, ge=1)
    #: Images per step.
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    #: Words in fewer captions than this, or in more than this share of them, are left out.
    min_captions: int = Field(default=10, ge=1)
    max_share: float = Field(default=0.5, gt=0.0, le=1.0)


class TrainingConfig(Config):
    """How a model is trained. Learning rates follow a cosine to zero after a linear warm-up."""

    without_effect: ClassVar[frozenset[str]] = frozenset({
        "checkpoint_every_steps", "checkpoint_keep", "checkpoint_uri", "divergence_factor", "divergence_steps",
        "engine", "log_every_steps", "zero_stage",
    })  # fmt: skip

    #: Conversations per optimizer step, of all processes together.
    global_batch_size: int = Field(default=32, ge=1)
    #: Conversations per forward pass of a process; gradients accumulate until the global batch is reached. None: a
    #: process's share of it at once.
    micro_batch_size: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=1.0, gt=0.0)
    #: Stop after this many optimizer steps instead of after `epochs`; the schedule ends there too.
    max_steps: int | None = Field(default=None, ge=1)
    #: Leave out conversations of other tasks than these (see `Sample.tasks`); None, and data without tasks: all count.
    tasks: tuple[str, ...] | None = None
    trainable: tuple[Part, ...] = ("projector",)
    projector_learning_rate: float = Field(default=1e-3, gt=0.0)
    language_model_learning_rate: float = Field(default=2e-5, gt=0.0)
    warmup_ratio: float = Field(default=0.03, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    adam_beta2: float = Field(default=0.999, gt=0.0, lt=1.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    #: bf16: matrix products in bfloat16 by autocast, weights and optimizer in float32.
    precision: Literal["fp32", "bf16"] = "fp32"
    #: Compute the matrix products and convolutions that stay in float32 as TF32, on GPUs that have it.
    tf32: bool = False
    #: Keep the inputs of the language model's layers alone and compute the rest again in the backward pass: less
    #: memory, about a third more time, the same gradients.
    gradient_checkpointing: bool = False
    #: Compile the language model's layers with torch.compile, for any lengths.
    compile: bool = False
    #: Use deterministic kernels only: two runs on the same machine give the same bits. Slower on a GPU.
    deterministic: bool = False
    #: Tokens per conversation, image tokens included; longer ones are cut.
    max_length: int = Field(default=2048, ge=8)
    #: Compute the frozen vision tower's features once and keep them on disk; false runs the tower in every step. Packs
    #: bring their pictures along, so with packing the tower runs in every step either way.
    cache_features: bool = True
    #: Train from packs, read from the shards as they are needed: conversations one behind another, none of which sees
    #: another, without padding. `global_batch_size` and `micro_batch_size` then hold on average.
    packing: bool = False
    #: With packing: tokens per forward pass, at most; captions of the contrastive objective come on top.
    pack_tokens: int = Field(default=8192, ge=8)
    #: With packing: threads that decode and tokenize ahead.
    pack_workers: int = Field(default=2, ge=1)
    #: Positions whose logits exist at a time.
    loss_chunk: int = Field(default=1024, ge=1)
    #: ddp: every process holds the whole model; with one process, plain training. deepspeed: ZeRO.
    engine: Literal["ddp", "deepspeed"] = "ddp"
    #: With deepspeed: what processes share among them. 1: the optimizer's state; 2: gradients too; 3: weights as well.
    zero_stage: Literal[1, 2, 3] | None = None
    #: Refuse to start where the estimate of memory says that it cannot fit; false only warns.
    check_memory: bool = True
    checkpoint_every_steps: int = Field(default=200, ge=1)
    #: Newest checkpoints that are kept.
    checkpoint_keep: int = Field(default=2, ge=1)
    #: Folder for copies of the checkpoints, so that the run can go on on another machine: an s3:// or file:// address
    #: with {fingerprint} in it, or output for one beside the stage's output. None: they are on the local disk alone.
    checkpoint_uri: str | None = None
    #: Stop where the generation loss is above this many times the median of the last 100 steps, for
    #: `divergence_steps` steps in a row. None: stop only where a loss is not finite.
    divergence_factor: float | None = Field(default=3.0, gt=1.0)
    divergence_steps: int = Field(default=10, ge=1)
    log_every_steps: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if not self.trainable:
            raise ValueError("trainable is empty; name projector, language_model or both")
        if self.engine == "deepspeed" and self.zero_stage is None:
            raise ValueError("engine=deepspeed needs zero_stage: 1, 2 or 3")
        if self.engine == "ddp" and self.zero_stage is not None:
            raise ValueError(f"zero_stage={self.zero_stage} has no effect with engine=ddp; give engine=deepspeed")
        if self.checkpoint_uri not in (None, "output") and "{fingerprint}" not in str(self.checkpoint_uri):
            raise ValueError(
                f"checkpoint_uri={self.checkpoint_uri!r} would be one folder for all runs; put {{fingerprint}} into it,"
                " as in s3://BUCKET/checkpoints/{fingerprint}, or give output"
            )
        if self.packing and self.pack_tokens < self.max_length:
            raise ValueError(
                f"pack_tokens={self.pack_tokens} is less than max_length={self.max_length}; a pack must hold the"
                " longest conversation"
            )
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of"
                f" micro_batch_size={self.micro_batch_size}"
            )
        return self
