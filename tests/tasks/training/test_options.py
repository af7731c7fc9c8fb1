"""Options that change how a step is computed, each trained for real."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tasks.errors import ConfigError
from tasks.training import worker
from tasks.training.config import TrainingConfig
from tasks.training.optimizers import check_compiler
from tasks.training.spec import RunFolder, compute_learning_rate_factor
from tests.tiny import make_spec, read_unet, train_here


def train(folder: Path, model: Path, **changes: object) -> RunFolder:
    return train_here(folder, model, **{"max_train_steps": 4, **changes})


def losses(run: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.losses.read_text().splitlines()]


def is_equal(first: RunFolder, second: RunFolder) -> bool:
    return all(torch.equal(tensor, read_unet(second)[name]) for name, tensor in read_unet(first).items())


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"is_gradient_checkpointed": True}, 1e-5),
        ({"is_channels_last": True}, 1e-3),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 2}, 1e-4),
    ],
    ids=["checkpointing", "channels last", "accumulation"],
)
def test_what_leaves_the_mathematics_alone(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, object], tolerance: float
) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    other = train(tmp_path / "other", tiny_model_folder, **changes)
    assert losses(plain) == pytest.approx(losses(other), rel=tolerance)


def test_averages_are_published_and_training_stays_as_it_is(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    averaged = train(tmp_path / "averaged", tiny_model_folder, ema_decay=0.9)
    assert losses(plain) == losses(averaged)
    assert not is_equal(plain, averaged)


def test_dropped_captions_change_the_loss(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    dropped = train(tmp_path / "dropped", tiny_model_folder, caption_dropout=1.0)
    assert losses(plain) != losses(dropped)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "prodigy"}, {"optimizer": "adamw8bit"}, {"precision": "fp16"}],
    ids=["prodigy", "8-bit moments", "fp16 with its scaler"],
)
def test_what_has_a_state_of_its_own_resumes_with_it(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, object]
) -> None:
    changes = {**changes, "checkpoint_every_steps": 2, "max_train_steps": 6}
    whole = train(tmp_path / "whole", tiny_model_folder, **changes)
    train(tmp_path / "cut", tiny_model_folder, **changes)
    run = RunFolder(tmp_path / "cut" / "run")
    run.result.unlink()
    shutil.rmtree(sorted(run.checkpoints.glob("step-*"))[-1])
    assert worker.train(make_spec(tmp_path / "cut", tiny_model_folder, **changes)) == 0
    assert json.loads(run.result.read_text())["start_step"] == 4
    assert is_equal(whole, run)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.02), ("bf16", 0.05)])
def test_half_precision_computes_roughly_and_keeps_whole_weights(
    tmp_path: Path, tiny_model_folder: Path, precision: str, tolerance: float
) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    half = train(tmp_path / "half", tiny_model_folder, precision=precision)
    kept = [loss for loss in losses(half) if loss is not None]  # fp16's scaler may leave the first steps out
    assert kept[0] != losses(plain)[0], "it computed in fp32"
    assert kept[0] == pytest.approx(losses(plain)[0], rel=tolerance)
    assert {tensor.dtype for tensor in read_unet(half).values()} == {torch.float32}


def test_where_torch_cannot_compile_it_is_said() -> None:
    with pytest.raises(ConfigError, match="a folder with a space in its name"):
        check_compiler(torch.device("cpu"), Path("/a place/torch"))
    check_compiler(torch.device("cpu"), Path("/place/torch"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++; install it")
@pytest.mark.skipif(" " in torch.__file__, reason="torch can't compile from a folder with a space; clone elsewhere")
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_losses(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    compiled = train(tmp_path / "compiled", tiny_model_folder, is_compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_half_precision_needs_frozen_weights_of_the_same() -> None:
    with pytest.raises(ValueError, match="frozen_precision=bf16 needs the same precision"):
        TrainingConfig(frozen_precision="bf16")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.5, 0.25]),
        ("cosine", [1.0, 0.5, 0.146]),
        ("cosine_with_restarts", [1.0, 1.0, 0.5]),
        ("polynomial", [1.0, 0.25, 0.0625]),
    ],
)
def test_schedules_are_functions_of_the_step(schedule: str, expected: list[float]) -> None:
    config = TrainingConfig(lr_schedule=schedule, max_train_steps=100, lr_num_cycles=2, lr_power=2.0)  # type: ignore[arg-type]
    factors = [compute_learning_rate_factor(config, step) for step in (0, 50, 75)]
    assert factors == pytest.approx(expected, abs=1e-3)
    warm = config.model_copy(update={"lr_warmup_steps": 10})
    assert compute_learning_rate_factor(warm, 0) == pytest.approx(0.1)
