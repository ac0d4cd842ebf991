"""``shellv model`` as a user runs it, from CodeShell's files to an answer of plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shellv_core.cli import main
from shellv_core.config import apply_overrides
from shellv_core.errors import ModelError
from shellv_core.models.compose import build_model, load_model
from shellv_core.models.model_command import EXPORT_FORMATS
from shellv_core.stages.presets import preset
from tests.models.checkpoints_tiny import clip_directory, language_model
from tests.models.test_codeshell import read_all, same, without_buffers
from tests.models.test_compose import STRANGER, inputs

BUILD = ["vision_tower.kind=clip", "vision_tower.image_size=28", "vision_tower.feature_layer=-2"]
BUILD += ["vision_tower.select_strategy=default", "vision_tower.standardize=false", "template=shellv"]


def answer_of_plain_transformers(directory, folder):
    """Token ids that a process without this project generates for a picture."""
    Image.new("RGB", (50, 30), (200, 10, 10)).save(folder / "picture.png")
    packages = json.dumps([path for path in sys.path if path.endswith("site-packages")])
    program = f"import sys; sys.path += {packages}\n{STRANGER}"
    arguments = [str(directory), str(folder / "picture.png"), ""]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *arguments], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_from_codeshell_to_an_answer(tmp_path, capsys):
    _, tensors = language_model("shellv", tmp_path / "shell", "bin shards")
    clip = clip_directory(tmp_path / "clip")
    assert main(["model", "convert", str(tmp_path / "shell"), str(tmp_path / "starcoder2")]) == 0
    assert "is a CodeShell language model; wrote" in capsys.readouterr().out
    pretrained = [f"{part}.pretrained={tmp_path / 'starcoder2'}" for part in ("language_model", "tokenizer")]
    build = [*BUILD, f"vision_tower.pretrained={clip}", *pretrained]
    assert main(["model", "build", str(tmp_path / "model"), *build]) == 0
    assert "a LlavaForConditionalGeneration with" in capsys.readouterr().out
    assert main(["model", "export", "--format", "shellv", str(tmp_path / "model"), str(tmp_path / "shellv")]) == 0
    exported = read_all(tmp_path / "shellv")
    assert same({name: exported[name] for name in without_buffers(tensors)}, without_buffers(tensors))
    assert main(["model", "convert", str(tmp_path / "shellv"), str(tmp_path / "again")]) == 0
    model, processor = load_model(tmp_path / "model")
    batch = inputs(processor)
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert answer_of_plain_transformers(tmp_path / "again", tmp_path) == expected.tolist() != []


def test_the_published_recipe_builds_from_local_directories(tmp_path, capsys):
    """Everything of the preset, with a small language model and tower in place of Shell-7B and CLIP ViT-L."""
    language_model("shellv", tmp_path / "shell")
    clip = clip_directory(tmp_path / "clip")
    recipe = preset("shellv-7b").pretrain_projector.model
    local = ["vision_tower.image_size=28", f"vision_tower.pretrained={clip}"]
    pretrained = [f"{part}.pretrained={tmp_path / 'shell'}" for part in ("language_model", "tokenizer")]
    with pytest.raises(ModelError, match="shellv model convert") as refused:
        build_model(apply_overrides(recipe, [*local, *pretrained]))
    command = str(refused.value).split("`")[1].split()
    assert command[0] == "shellv"
    assert main(command[1:]) == 0
    converted = [f"{part}.pretrained={command[-1]}" for part in ("language_model", "tokenizer")]
    model, _ = build_model(apply_overrides(recipe, [*local, *converted]))
    assert model.config.text_config.model_type == "starcoder2"
    assert model.config.text_config.vocab_size == 440


def test_faults_are_one_paragraph(tmp_path, capsys):
    assert main(["model", "convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith(
        "does not exist; give a checkpoint's directory, a mm_projector.bin, or a GGUF file.\n"
    )
    assert main(["model", "build", str(tmp_path / "out")]) == 2
    assert "give tokenizer.pretrained=DIR here" in capsys.readouterr().err
    assert main(["model", "convert", "a", "b", "--template", "shelv"]) == 2
    assert "did you mean 'shellv'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_formats_are_those_of_the_exporter():
    from shellv_core.models.exporting import export

    for form in EXPORT_FORMATS:
        with pytest.raises(ModelError, match=r"does not exist|needs the"):
            export(Path("nowhere"), Path("nowhere else"), form)
