import numpy as np
import pytest
import torch

from shellv_core.errors import DataError
from shellv_core.training import features as features_module
from shellv_core.training.examples import image_bytes
from shellv_core.training.features import LiveFeatures, cached_features, features_key, pixel_batches, tower_features
from tests.training.tiny import CLIP, EFFICIENTNET, tiny_model, tiny_samples


def images():
    return image_bytes(tiny_samples(11))


@pytest.mark.parametrize("vision_tower", [EFFICIENTNET, CLIP], ids=["efficientnet", "clip"])
def test_cached_live_and_llavas_own_path_agree(tmp_path, vision_tower):
    model, processor = tiny_model(vision_tower)
    cached = cached_features(images, 11, "data", model, processor, torch.float32)
    live = LiveFeatures(images(), tmp_path / "images.bin", model, processor)
    rows = np.array([1, 4, 10])
    features = cached.gather(rows)
    assert features.shape == (3, 4, model.config.vision_config.hidden_size)
    torch.testing.assert_close(live.gather(rows), features, atol=1e-5, rtol=1e-5)

    every = list(pixel_batches(images(), processor))
    with torch.no_grad():
        own = [model.get_image_features(pixel_values).pooler_output for pixel_values in every]
        own = torch.stack([image for batch in own for image in batch])
        assert torch.equal(model.model.multi_modal_projector(cached.gather(np.arange(11))), own)


def test_bfloat16_cache_is_exact_under_autocast():
    model, processor = tiny_model()
    full = cached_features(images, 11, "data", model, processor, torch.float32).gather(np.arange(11))
    half = cached_features(images, 11, "data", model, processor, torch.bfloat16).gather(np.arange(11))
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model.model.multi_modal_projector(half), model.model.multi_modal_projector(full))


def test_cache_is_read_not_made_again_and_goes_on_after_a_kill(monkeypatch, project_folder):
    monkeypatch.setattr(features_module, "IMAGES_PER_FILE", 4)
    model, processor = tiny_model()
    whole = cached_features(images, 11, "data", model, processor, torch.float32).features

    def no_images():
        raise AssertionError("the images were read although the cache is complete")

    assert torch.equal(cached_features(no_images, 11, "data", model, processor, torch.float32).features, whole)
    files = sorted((project_folder / "cache" / "features").glob("*/*.safetensors"))
    assert len(files) == 3
    first_bytes = files[0].read_bytes()
    files[2].unlink()
    assert torch.equal(cached_features(images, 11, "data", model, processor, torch.float32).features, whole)
    assert files[0].read_bytes() == first_bytes


def test_key_follows_everything_that_features_depend_on():
    model, processor = tiny_model()
    keys = {features_key("data", model, processor, torch.float32)}
    assert keys == {features_key("data", model, processor, torch.float32)}
    keys.add(features_key("other data", model, processor, torch.float32))
    keys.add(features_key("data", model, processor, torch.bfloat16))
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    keys.add(features_key("data", model, processor, torch.float32))
    with torch.no_grad():
        model.model.vision_tower.feature_mean += 1
    keys.add(features_key("data", model, processor, torch.float32))
    assert len(keys) == 5


def test_features_tell_pictures_apart():
    model, processor = tiny_model()
    (batch,) = pixel_batches(image_bytes(tiny_samples(2)), processor)
    first, second = tower_features(model, batch)
    assert not torch.allclose(first, second, atol=0.1)


def test_undecodable_image_has_an_address():
    _, processor = tiny_model()
    with pytest.raises(DataError, match=r"image 2 \(4 bytes\) cannot be decoded"):
        list(pixel_batches(iter([*image_bytes(tiny_samples(2)), b"junk"]), processor))
