"""A loss without chance in it, and what hangs on it: best weights, early stopping, sample grids."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tasks.training import callbacks
from tasks.training.config import ValidationSettings
from tasks.training.validation import has_settled, read_validations
from tests.tiny import read_unet, train_here


def test_validating_and_sampling_leave_training_as_it_is(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train_here(tmp_path / "plain", tiny_model_folder)
    watched = {"every_steps": 2, "sample_every_steps": 3, "sample_prompts": ("a photo of {subject}", "{subject}")}
    run = train_here(tmp_path / "watched", tiny_model_folder, validation=watched)
    assert all(torch.equal(tensor, read_unet(run)[name]) for name, tensor in read_unet(plain).items())
    losses = run.losses.read_text().splitlines()
    assert [step for step, _ in read_validations(losses)] == [2, 4, 6, 8]
    assert [path.name for path in sorted(run.samples.iterdir())] == ["step-00000003.png", "step-00000006.png"]
    assert Image.open(run.samples / "step-00000003.png").size == (64, 64)


def test_the_same_weights_have_the_same_validation_loss(tmp_path: Path, tiny_model_folder: Path) -> None:
    runs = [
        train_here(tmp_path / str(steps), tiny_model_folder, max_train_steps=steps, validation={"every_steps": 2})
        for steps in (2, 4)
    ]
    first, second = (dict(read_validations(run.losses.read_text().splitlines())) for run in runs)
    assert first[2] == second[2]
    assert second[2] != second[4]


def test_the_best_weights_are_published(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter((0.9, 0.4, 0.6, 0.5))
    monkeypatch.setattr(callbacks, "compute_validation_loss", lambda module: torch.tensor(next(measured)))
    run = train_here(tmp_path / "best", tiny_model_folder, validation={"every_steps": 2, "keep": "best"})
    result = json.loads(run.result.read_text())
    assert (result["published_step"], result["num_steps"]) == (4, 8)
    short = train_here(tmp_path / "short", tiny_model_folder, max_train_steps=4)
    assert all(torch.equal(tensor, read_unet(short)[name]) for name, tensor in read_unet(run).items())


def test_training_stops_where_the_loss_has_settled(tmp_path: Path, tiny_model_folder: Path) -> None:
    settings = {"every_steps": 1, "is_early_stopping": True, "window": 2, "threshold": 0.9}
    run = train_here(tmp_path, tiny_model_folder, max_train_steps=40, validation=settings)
    steps = json.loads(run.result.read_text())["num_steps"]
    assert 4 <= steps < 40
    assert len(run.losses.read_text().splitlines()) == steps


@pytest.mark.parametrize(("late", "is_settled"), [([0.5, 0.5001, 0.4999], True), ([0.2, 0.7, 0.4], False)])
def test_settled_means_little_variance_of_late(late: list[float], is_settled: bool) -> None:
    values = [1.0, 0.8, 0.6, *late]
    lines = [json.dumps({"step": i, "validation_loss": value}) for i, value in enumerate(values)]
    assert has_settled(lines, ValidationSettings(window=3)) is is_settled
    assert not has_settled(lines[:5], ValidationSettings(window=3))
