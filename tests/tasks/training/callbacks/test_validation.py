"""A loss without chance in it, and what hangs on it: best weights, early stopping, sample grids."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import SamplingRequest
from tasks.encoders.config import EncoderConfig
from tasks.encoders.embeddings import Encoders
from tasks.errors import ConfigError
from tasks.manifests.training import LossRow, parse_losses
from tasks.training.callbacks import validation as callbacks
from tasks.training.callbacks.stop import has_converged
from tasks.training.callbacks.validation import compute_validation_loss
from tasks.training.config import TrainingConfig, ValidationSettings
from tasks.training.data.datamodule import DreamBoothDataModule
from tasks.training.data.holdout import resolve_validation
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder
from tests.support.config import make_config
from tests.support.tiny import make_spec, read_unet, train_here


def read_validations(run: RunFolder) -> dict[int, float]:
    """Return the validation losses of a run by step."""
    rows = parse_losses(run.losses.read_text())
    return {row.step: row.validation_loss for row in rows if row.validation_loss is not None}


def test_validation_and_sampling_do_not_change_training(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train_here(tmp_path / "plain", tiny_model_folder)
    watched = {"validation_steps": 2, "sample_steps": 3, "sample_prompts": ("a photo of {subject}", "{subject}")}
    run = train_here(tmp_path / "watched", tiny_model_folder, validation=watched)
    assert all(torch.equal(tensor, read_unet(run)[name]) for name, tensor in read_unet(plain).items())
    assert list(read_validations(run)) == [2, 4, 6, 8]
    assert [path.name for path in sorted(run.samples.iterdir())] == ["step-00000003.png", "step-00000006.png"]
    with Image.open(run.samples / "step-00000003.png") as grid:
        assert grid.size == (64, 64)


def test_the_same_weights_have_the_same_validation_loss(tmp_path: Path, tiny_model_folder: Path) -> None:
    runs = [
        train_here(tmp_path / str(steps), tiny_model_folder, max_train_steps=steps, validation={"validation_steps": 2})
        for steps in (2, 4)
    ]
    first, second = (read_validations(run) for run in runs)
    assert first[2] == second[2]
    assert second[2] != second[4]


def test_the_best_weights_are_published(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter((0.9, 0.4, 0.6, 0.5))
    monkeypatch.setattr(callbacks, "compute_validation_loss", lambda module, batches: torch.tensor(next(measured)))
    run = train_here(tmp_path / "best", tiny_model_folder, validation={"validation_steps": 2, "keep": "best"})
    result = json.loads(run.result.read_text())
    assert (result["published_step"], result["num_steps"]) == (4, 8)
    short = train_here(tmp_path / "short", tiny_model_folder, max_train_steps=4)
    assert all(torch.equal(tensor, read_unet(short)[name]) for name, tensor in read_unet(run).items())


def test_save_top_k_checkpoints_are_retained_in_the_published_format(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter((0.9, 0.4, 0.6, 0.5))
    monkeypatch.setattr(callbacks, "compute_validation_loss", lambda module, batches: torch.tensor(next(measured)))
    validation = {"validation_steps": 2, "keep": "best", "save_top_k": 3}
    run = train_here(tmp_path / "best", tiny_model_folder, method="lora", validation=validation)
    assert json.loads(run.result.read_text())["published_step"] == 4
    assert [path.name for path in sorted(run.candidates.iterdir())] == ["step-00000006", "step-00000008"]
    last = train_here(tmp_path / "last", tiny_model_folder, method="lora")
    name = "pytorch_lora_weights.safetensors"
    kept, plain = load_file(run.candidates / "step-00000008" / name), load_file(last.model / name)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in plain.items())


def test_validation_similarity_is_measured_on_samples_of_the_current_weights(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    prompts = ("a photo of {subject}", "{subject} in the snow")
    encoders = make_config(EncoderConfig, clip="mini", dino="mini", dino_resize=None)
    validation = {"validation_steps": 4, "keep": "best", "metric": "similarity", "sample_prompts": prompts}
    spec = make_spec(tmp_path, tiny_model_folder, validation=validation).model_copy(update={"encoders": encoders})
    run = train_here(tmp_path, tiny_model_folder, spec=spec)
    logged = {row["step"]: row["validation_similarity"] for row in map(json.loads, run.losses.read_text().splitlines())
              if "validation_similarity" in row}  # fmt: skip
    best = json.loads(run.result.read_text())["published_step"]
    assert logged[best] == max(logged.values())
    # The same, from the published weights and by other code.
    model = load_model(spec.diffusion, folder=run.model)
    told = [("a photo of sks fish", "a photo of a fish"), ("sks fish in the snow", "a fish in the snow")]
    measure = Encoders(encoders, torch.device("cpu"))
    photos = measure.encode_dino([Image.open(image.path).convert("RGB") for image in spec.instance_images])
    dino, clip_t = [], []
    for prompt, plain in told:
        requests = [SamplingRequest(prompt, seed) for seed in (7, 8)]
        pictures = model.sample(requests, num_inference_steps=20, guidance_scale=3.0)
        dino += [float(row @ photo) for row in measure.encode_dino(pictures) for photo in photos]
        clip_t += [float(row @ measure.encode_texts([plain])[0]) for row in measure.encode_clip(pictures)]
    assert logged[best] == pytest.approx(sum(dino) / len(dino) * sum(clip_t) / len(clip_t), abs=1e-4)


def test_early_stopping_ends_training_when_the_loss_has_converged(tmp_path: Path, tiny_model_folder: Path) -> None:
    settings = {"validation_steps": 1, "early_stopping": True, "window": 2, "threshold": 0.9}
    run = train_here(tmp_path, tiny_model_folder, max_train_steps=40, validation=settings)
    steps = json.loads(run.result.read_text())["num_steps"]
    assert 4 <= steps < 40
    assert len(run.losses.read_text().splitlines()) == steps


@pytest.mark.parametrize(("late", "is_settled"), [([0.5, 0.5001, 0.4999], True), ([0.2, 0.7, 0.4], False)])
def test_convergence_requires_low_variance_within_the_window(late: list[float], is_settled: bool) -> None:
    values = [1.0, 0.8, 0.6, *late]
    rows = [LossRow(step=i, validation_loss=value) for i, value in enumerate(values)]
    assert has_converged(rows, make_config(ValidationSettings, window=3)) is is_settled
    assert not has_converged(rows[:5], make_config(ValidationSettings, window=3))


@pytest.mark.parametrize(("threshold", "is_settled"), [(0.01, False), (0.5, True)])
def test_convergence_depends_on_the_threshold(threshold: float, is_settled: bool) -> None:
    rows = [LossRow(step=i, validation_loss=value) for i, value in enumerate([1.0, 0.8, 0.6, 0.5, 0.4, 0.3])]
    assert has_converged(rows, make_config(ValidationSettings, window=3, threshold=threshold)) is is_settled


def resolve(num_photos: int, **validation: object) -> tuple[TrainingConfig, str]:
    notes: list[str] = []
    config = make_config(TrainingConfig, validation={"validation_steps": 2, "keep": "best", **validation})
    return resolve_validation(config, num_photos, notes.append), " ".join(notes)


@pytest.mark.parametrize(("num_photos", "expected"), [(6, 1), (10, 2), (20, 4)])
def test_selection_by_loss_holds_out_photos_if_there_are_enough(num_photos: int, expected: int) -> None:
    config, note = resolve(num_photos)
    assert (config.validation.metric, config.validation.num_holdout) == ("loss", expected)
    assert f"{expected} of {num_photos} photos" in note


@pytest.mark.parametrize("changes", [{}, {"num_holdout": 0}])
def test_selection_by_loss_with_few_photos_falls_back_to_similarity_with_a_note(changes: dict[str, int]) -> None:
    config, note = resolve(5, **changes)
    assert (config.validation.metric, config.validation.num_holdout) == ("similarity", 0)
    assert "similarity" in note
    assert "training.validation.num_holdout" in note


def test_num_holdout_is_respected_and_holding_out_all_photos_is_rejected() -> None:
    assert resolve(4, num_holdout=1)[0].validation.num_holdout == 1
    assert resolve(9, metric="similarity")[0].validation.num_holdout == 0
    assert resolve(9, keep="last", num_holdout=2)[0].validation.num_holdout == 2
    with pytest.raises(ConfigError, match="training.validation.num_holdout=4 of 4 photos"):
        resolve(4, num_holdout=4)


def test_held_out_photos_are_validated_on_and_never_trained_on(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, validation={"validation_steps": 2, "keep": "best"}, max_train_steps=4)
    first, *others = spec.instance_images
    spec = spec.model_copy(update={"instance_images": tuple(others), "holdout_images": (first,)})
    model = load_model(spec.diffusion)
    assert isinstance(model, DiffusionModel)
    module = DreamBoothModule(model, spec)
    batches = DreamBoothDataModule(model, spec).make_batches()
    held = batches.holdout[0]
    latents = torch.cat([bucket.sets["instance"].mean for bucket in batches.buckets])
    assert len(held) == 1
    assert not any(torch.equal(held.mean[0], row) for row in latents)
    before = float(compute_validation_loss(module, batches))
    held.mean.add_(1.0)
    assert float(compute_validation_loss(module, batches)) != before
    without = spec.model_copy(update={"holdout_images": ()})
    assert spec.fingerprint() != without.fingerprint()
    runs = [train_here(tmp_path / name, tiny_model_folder, spec=one.model_copy(update={"folder": str(tmp_path / name)}))
            for name, one in (("held", spec), ("all", without))]  # fmt: skip
    rows = [[json.loads(line) for line in run.losses.read_text().splitlines()] for run in runs]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert rows[0][-1]["validation_loss"] != rows[1][-1]["validation_loss"]
