"""HACL's heads on a served model: how well sentences fit pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shellv_core.data.conversation import encode_captions
from shellv_core.errors import ModelError
from shellv_core.serving.engine import ImagePart, Message, TextPart
from shellv_core.serving.prompt import PromptEncoder
from shellv_core.serving.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from shellv_core.models.hacl import HaclHeads

MAX_SENTENCE_TOKENS = 128
_GRAY = (127, 127, 127)


class HeadsGrounding:
    """Embeds pictures and sentences as training does: apart from each other, read at the end-of-text token.

    What the model computes runs on the engine's thread between two steps of its answers.

    Args:
        engine: runs `model`.
        model: a LLaVA model of transformers.
        processor: the model's.
        heads: trained with this very model.

    Raises:
        ModelError: if the heads are for another size.
    """

    def __init__(self, engine: TransformersEngine, model: Any, processor: Any, heads: HaclHeads) -> None:
        hidden_size = model.config.get_text_config().hidden_size
        if heads.hidden_size != hidden_size:
            raise ModelError(
                f"the heads are for a hidden size of {heads.hidden_size}, this model's is {hidden_size}; give those of"
                " the finetune output that the model was merged from."
            )
        self._engine, self._model = engine, model
        self._heads = heads.to(model.get_input_embeddings().weight.device).eval()
        # Copies, as a tokenizer's settings must not change under another thread.
        processor = copy.deepcopy(processor)
        self._tokenizer, self._encoder = processor.tokenizer, PromptEncoder(processor)
        self._blank: torch.Tensor | None = None

    async def margins(self, images: Sequence[Image.Image], sentences: Sequence[str]) -> list[float]:
        """See `Grounding.margins`."""
        return await self._engine.between_steps(lambda: self._margins(images, sentences))

    async def embeddings(
        self, images: Sequence[Image.Image], sentences: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalized float32 embeddings of pictures (I, D), a blank picture (D,) and sentences (S, D)."""
        return await self._engine.between_steps(lambda: self._embeddings(images, sentences))

    def _margins(self, images: Sequence[Image.Image], sentences: Sequence[str]) -> list[float]:
        images_ID, blank_D, texts_SD = self._embeddings(images, sentences)
        best_S = (texts_SD @ images_ID.T).amax(dim=1)
        margins: list[float] = (best_S - texts_SD @ blank_D).tolist()
        return margins

    def _embeddings(
        self, images: Sequence[Image.Image], sentences: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch
        from PIL import Image

        if self._blank is None:
            self._blank = self._embed_image(Image.new("RGB", (64, 64), _GRAY))
        return torch.stack([self._embed_image(image) for image in images]), self._blank, self._embed_texts(sentences)

    def _embed_image(self, image: Image.Image) -> torch.Tensor:
        """Embedding (D,) of the state behind [prefix, picture, end of text]."""
        import torch

        prompt = self._encoder.encode([Message("user", (ImagePart(image), TextPart("?")))])
        ids = torch.tensor(prompt.token_ids, device=self._model.device)
        places = (ids == prompt.image_token_id).nonzero()[:, 0]
        ids = torch.cat([ids[: int(places[-1]) + 1], ids.new_tensor([self._tokenizer.eos_token_id])])
        embeddings = self._model.get_input_embeddings()(ids)
        pixels = prompt.images[0].pixel_values.to(self._model.device, self._model.dtype)
        features = self._model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        embeddings[places] = features.to(embeddings.dtype)
        return self._heads.embed_images(self._states(embeddings[None])[0, -1].float())

    def _embed_texts(self, sentences: Sequence[str]) -> torch.Tensor:
        """Embeddings (S, D) of the states behind [sentence, end of text]."""
        import torch

        device = self._model.device
        encoded = [
            torch.from_numpy(each).long() for each in encode_captions(self._tokenizer, sentences, MAX_SENTENCE_TOKENS)
        ]
        ids_ST = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True).to(device)
        ends_S = torch.tensor([len(each) - 1 for each in encoded], device=device)
        # Right-padded under causal attention: nothing that counts comes after the padding's begin.
        states_STH = self._states(self._model.get_input_embeddings()(ids_ST))
        return self._heads.embed_texts(states_STH[torch.arange(len(encoded), device=device), ends_S].float())

    def _states(self, embeddings: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._model.model.language_model(
            inputs_embeds=embeddings, use_cache=False
        ).last_hidden_state
        return states
