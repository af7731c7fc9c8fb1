"""Options that change how a step is computed, each trained for real."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from tasks.errors import ConfigError
from tasks.training.config import TrainingConfig
from tasks.training.optimizers import check_compiler, make_optimizer
from tasks.training.process import worker
from tasks.training.process.worker_spec import RunFolder, compute_learning_rate_factor
from tests.support.config import make_config
from tests.support.tiny import make_spec, read_unet, train_here


def train(folder: Path, model: Path, **changes: object) -> RunFolder:
    return train_here(folder, model, **{"max_train_steps": 4, **changes})


def losses(run: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.losses.read_text().splitlines()]


def is_equal(first: RunFolder, second: RunFolder) -> bool:
    return all(torch.equal(tensor, read_unet(second)[name]) for name, tensor in read_unet(first).items())


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"channels_last": True}, 1e-3),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 2}, 1e-4),
    ],
    ids=["checkpointing", "channels last", "accumulation"],
)
def test_memory_saving_options_do_not_change_the_losses(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, object], tolerance: float
) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    other = train(tmp_path / "other", tiny_model_folder, **changes)
    assert losses(plain) == pytest.approx(losses(other), rel=tolerance)


def test_ema_weights_are_published_and_training_is_unchanged(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    averaged = train(tmp_path / "averaged", tiny_model_folder, ema_decay=0.9)
    assert losses(plain) == losses(averaged)
    assert not is_equal(plain, averaged)


def test_proportion_empty_prompts_changes_the_loss(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    dropped = train(tmp_path / "dropped", tiny_model_folder, proportion_empty_prompts=1.0)
    assert losses(plain) != losses(dropped)


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "prodigy"}, {"optimizer": "adamw8bit"}, {"mixed_precision": "fp16"}],
    ids=["prodigy", "8-bit optimizer state", "fp16 with its scaler"],
)
def test_optimizer_and_grad_scaler_states_are_restored_on_resume(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, object]
) -> None:
    changes = {**changes, "checkpointing_steps": 2, "max_train_steps": 6}
    whole = train(tmp_path / "whole", tiny_model_folder, **changes)
    train(tmp_path / "cut", tiny_model_folder, **changes)
    run = RunFolder(tmp_path / "cut" / "run")
    run.result.unlink()
    shutil.rmtree(sorted(run.checkpoints.glob("step-*"))[-1])
    assert worker.train(make_spec(tmp_path / "cut", tiny_model_folder, **changes)) == 0
    assert json.loads(run.result.read_text())["start_step"] == 4
    assert is_equal(whole, run)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.02), ("bf16", 0.05)])
def test_mixed_precision_approximates_the_fp32_loss_and_keeps_fp32_weights(
    tmp_path: Path, tiny_model_folder: Path, precision: str, tolerance: float
) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    half = train(tmp_path / "half", tiny_model_folder, mixed_precision=precision)
    kept = [loss for loss in losses(half) if loss is not None]  # fp16's scaler may leave the first steps out
    assert kept[0] != losses(plain)[0], "it computed in fp32"
    assert kept[0] == pytest.approx(losses(plain)[0], rel=tolerance)
    assert {tensor.dtype for tensor in read_unet(half).values()} == {torch.float32}


def test_an_install_path_that_torch_cannot_compile_from_raises_an_error() -> None:
    with pytest.raises(ConfigError, match="a folder with a space in its name"):
        check_compiler(torch.device("cpu"), Path("/a place/torch"))
    check_compiler(torch.device("cpu"), Path("/place/torch"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++; install it")
@pytest.mark.skipif(" " in torch.__file__, reason="torch can't compile from a folder with a space; clone elsewhere")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch._dynamo
def test_compiled_blocks_give_the_same_losses(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = train(tmp_path / "plain", tiny_model_folder)
    compiled = train(tmp_path / "compiled", tiny_model_folder, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_weight_dtype_requires_the_same_mixed_precision() -> None:
    with pytest.raises(ValueError, match="weight_dtype=bf16 needs mixed_precision=bf16"):
        make_config(TrainingConfig, weight_dtype="bf16")


def reference_rates(config: TrainingConfig, rate: float) -> list[float]:
    """Return the learning rate of every step as diffusers' training scripts have it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps, num_cycles=config.lr_num_cycles, power=config.lr_power,
    )  # fmt: skip
    rates = []
    for _ in range(config.max_train_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    "schedule", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_every_lr_scheduler_matches_diffusers_at_every_step(schedule: str, warmup: int) -> None:
    warmup = 0 if schedule == "constant" else warmup
    config = make_config(
        TrainingConfig, lr_scheduler=schedule, lr_warmup_steps=warmup, max_train_steps=40, lr_num_cycles=3, lr_power=2.0
    )  # type: ignore[arg-type]
    for rate in (1e-4, 5e-6):
        rates = [rate * compute_learning_rate_factor(config, step, rate=rate) for step in range(40)]
        # The same float64 formulas, at most in another order.
        assert rates == pytest.approx(reference_rates(config, rate), rel=1e-12, abs=1e-18)


def test_lr_warmup_steps_with_a_constant_lr_scheduler_are_rejected() -> None:
    with pytest.raises(ValueError, match="constant_with_warmup"):
        make_config(TrainingConfig, lr_scheduler="constant", lr_warmup_steps=5)


def test_prodigy_preserves_the_learning_rate_ratio_of_parameter_groups() -> None:
    def first_moves(rates: tuple[float, float]) -> list[float]:
        parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in rates]
        groups = [{"params": [p], "lr": r, "base_lr": r, "weight_decay": 0.0}
                  for p, r in zip(parameters, rates, strict=True)]  # fmt: skip
        optimizer = make_optimizer(groups, make_config(TrainingConfig, optimizer="prodigy"))
        for parameter in parameters:
            parameter.grad = torch.ones(3)
        optimizer.step()
        return [float(parameter[0].detach()) for parameter in parameters]

    alike, apart = first_moves((1e-4, 1e-4)), first_moves((1e-4, 2e-5))
    assert alike[0] == alike[1] != 0.0
    assert apart[0] == alike[0]
    # One float32 interpolation.
    assert apart[1] == pytest.approx(0.2 * apart[0], rel=1e-6)
