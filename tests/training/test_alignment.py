import numpy as np
import pytest
import torch

from shellv_core.errors import TrainingError
from shellv_core.training.alignment import align_words, caption_words
from shellv_core.training.config import AlignmentConfig, TrainingConfig
from shellv_core.training.examples import image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, pixel_batches, tower_features
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel
from tests.training.tiny import tiny_model, tiny_samples

CONFIG = AlignmentConfig(epochs=40, batch_size=4, learning_rate=1e-2, min_captions=2)


@pytest.fixture
def parts():
    model, processor = tiny_model()
    samples = tiny_samples(12)
    examples = tokenize_samples(samples, processor.tokenizer, processor.image_token_id, 4, 256)
    features = torch.cat([tower_features(model, batch) for batch in pixel_batches(image_bytes(samples), processor)])
    return model, processor, examples, CachedFeatures((features - features.mean((0, 1))) / features.std((0, 1)))


def test_words_that_tell_captions_apart(parts):
    _, processor, examples, _ = parts
    images, targets, token_ids = caption_words(examples, min_captions=2, max_share=0.5)
    assert images.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    words = [word.strip() for word in processor.tokenizer.batch_decode(token_ids[:, None])]
    assert {"red", "green", "blue"} <= set(words)
    assert not {"picture", "with", "number"} & set(words)
    red = targets[:, words.index("red")]
    assert images[red].tolist() == [0, 3, 6, 9]
    with pytest.raises(TrainingError, match="has no word to learn: of 11 captions"):
        caption_words(examples, min_captions=12, max_share=0.5)


def test_image_tokens_come_to_name_their_words(parts):
    model, _processor, examples, features = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logged = {}
    metrics = align_words(model, examples, features, CONFIG, 0, lambda values, step: logged.update({step: values}))
    assert metrics["alignment_f1"] > 0.9
    assert len(logged) == 40
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("multi_modal_projector" in name for name in changed)
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(features.gather(np.arange(8)))
    words = model.get_input_embeddings().weight.norm(dim=-1)
    torch.testing.assert_close(tokens.norm(dim=-1).mean(), words.median(), rtol=0.1, atol=0)


def test_rerun_takes_the_alignment_of_an_earlier_try(tmp_path):
    def run():
        model, processor = tiny_model()
        module = TrainingModel(model)
        training = TrainingConfig(max_steps=1, trainable=("language_model",), max_length=256)
        set_trainable(module, training)
        logged = []
        data = TrainingData(lambda: tiny_samples(12), 13, "tiny")
        log = lambda values, step: logged.extend(values)  # noqa: E731
        summary = fit(module, processor, data, training, 0, tmp_path, log, "test", CONFIG)
        return model.model.multi_modal_projector.state_dict(), summary.metrics, logged

    first, metrics, logged = run()
    again, metrics_again, logged_again = run()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert metrics_again["alignment_f1"] == metrics["alignment_f1"]
    assert "alignment_f1" in logged
    assert "alignment_f1" not in logged_again
