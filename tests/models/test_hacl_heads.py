from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shellv_core.errors import ModelError
from shellv_core.models.hacl import HaclHeads, load_heads, save_heads


@pytest.mark.parametrize("kind", ["linear", "none"])
def test_heads_are_read_as_they_were_and_always_written_alike(tmp_path: Path, kind: str) -> None:
    heads = HaclHeads(8, kind)
    paths = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for path in paths:
        save_heads(heads, path)
    assert len({path.read_bytes() for path in paths}) == 1
    read = load_heads(paths[0])
    assert (read.kind, read.hidden_size) == (kind, 8)
    assert {name: tensor.tolist() for name, tensor in read.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in heads.state_dict().items()
    }


def test_another_file_holds_no_heads(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="holds no HACL heads"):
        load_heads(path)
