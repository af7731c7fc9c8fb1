"""Equal tensors and metadata make equal files, so that a digest says whether two runs made the same."""

from pathlib import Path

import torch
from safetensors import safe_open

from tasks.diffusion.textual_inversion import EMBEDS_FILE, save_tokens
from tasks.stage.tensor_files import save_tensors

METADATA = {f"key-{index}": f'value {index} "quoted" \\ é 漢 \n\t\x01\x7f' for index in range(20)}


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
    for index in range(4):
        save_tensors(tensors, tmp_path / str(index), metadata=METADATA)
    assert len({(tmp_path / str(index)).read_bytes() for index in range(4)}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == METADATA
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert all(file.get_tensor(name).dtype == tensor.dtype for name, tensor in tensors.items())


def test_equal_tokens_make_equal_files(tmp_path: Path) -> None:
    contents = set()
    for index in range(8):
        folder = tmp_path / str(index)
        save_tokens(folder, "sks", {"text_encoder": torch.ones(2, 4)})
        contents.add((folder / EMBEDS_FILE).read_bytes())
    assert len(contents) == 1
