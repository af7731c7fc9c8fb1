"""The learning rate of every step in the loss log."""

from pathlib import Path

import pytest

from tasks.manifests.training import parse_losses
from tasks.training.process.worker_spec import compute_learning_rate_factor
from tests.support.tiny import make_spec, train_here


def test_the_loss_log_holds_the_learning_rate_that_each_step_took(tmp_path: Path, tiny_model_folder: Path) -> None:
    changes = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "log_every_n_steps": 3, "max_train_steps": 6}
    spec = make_spec(tmp_path, tiny_model_folder, **changes)
    rows = parse_losses(train_here(tmp_path, tiny_model_folder, spec=spec).losses.read_text())
    rate = spec.training.learning_rate
    wanted = [rate * compute_learning_rate_factor(spec.training, step, rate=rate) for step in range(6)]
    assert [row.learning_rate for row in rows] == pytest.approx(wanted)
    assert len(set(wanted)) > 3
