"""What the manifest of a training counts."""

from pathlib import Path

import pytest

from tasks.training.process.worker_spec import WorkerResult
from tasks.training.steps import count_training
from tests.support.tiny import make_spec

RESULT = WorkerResult(
    num_steps=4, published_step=4, start_step=0, final_loss=0.5, micro_batch_size=1, trainable_parameters=1,
    total_parameters=1, device="cpu", peak_memory_bytes=0, files={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, None),
        ({"num_devices": 2}, 2),
        ({"num_devices": 2, "num_nodes": 3, "rdzv_endpoint": "127.0.0.1:29500"}, 6),
    ],
)
def test_devices_are_counted_where_there_are_several(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, object], world_size: int | None
) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, train_batch_size=1, **changes)
    counts = count_training(spec, RESULT, num_cached_latents=0)
    assert counts.pop("world_size", None) == world_size
    assert counts == {"steps": 4, "resumed_from_step": 0}


def test_a_halved_micro_batch_and_an_earlier_start_are_counted(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, train_batch_size=2)
    counts = count_training(spec, RESULT.model_copy(update={"start_step": 3}), num_cached_latents=0)
    assert counts == {"steps": 4, "resumed_from_step": 3, "micro_batch_size": 1}


def test_images_whose_latents_were_found_are_counted(tmp_path: Path, tiny_model_folder: Path) -> None:
    counts = count_training(make_spec(tmp_path, tiny_model_folder), RESULT, num_cached_latents=7)
    assert counts["cached_latents"] == 7
