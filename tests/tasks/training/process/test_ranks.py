"""Two processes on one machine (gloo): the same random draws as one, exact resume, and no rank left behind."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tasks.errors import TrainingFailed
from tasks.training.config import ValidationSettings
from tasks.training.process import supervisor
from tasks.training.process.supervisor import run_worker
from tasks.training.process.worker_spec import RunFolder, TrainingSpec
from tests.support.cli_sandbox import ROOT
from tests.support.config import make_config
from tests.support.tiny import make_spec

STEPS = 8


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.model / "unet" / "diffusion_pytorch_model.safetensors")


def compute_path_difference(first: RunFolder, second: RunFolder, *, start: Path) -> float:
    """Return how far apart two runs ended, relative to how far the first one went from the base model.

    Single weights may differ by a whole step: Adam scales every gradient to the learning rate, also one that is
    nothing but rounding. All weights together may not.
    """
    base = load_file(start / "unet" / "diffusion_pytorch_model.safetensors")
    ours, theirs = weights(first), weights(second)
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in base)
    moved = sum(float((ours[name] - base[name]).double().square().sum()) for name in base)
    return float((apart / moved) ** 0.5)


def losses(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.losses.read_text().splitlines()]


def spec_of(folder: Path, model: Path, *, ranks: int) -> TrainingSpec:
    changes = {"train_batch_size": 2 // ranks, "num_devices": ranks, "gradient_accumulation_steps": 2}
    return make_spec(folder, model, max_train_steps=STEPS, checkpointing_steps=3, ema_decay=0.9, **changes)


def train(spec: TrainingSpec) -> RunFolder:
    run_worker(spec, on_event=lambda event: None)
    return RunFolder(spec.path)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[TrainingSpec, RunFolder]:
    """A run of two ranks that nothing disturbs."""
    spec = spec_of(tmp_path_factory.mktemp("two"), tiny_model_folder, ranks=2)
    return spec, train(spec)


def test_data_parallel_training_matches_one_rank_up_to_summation_order(
    tmp_path: Path, tiny_model_folder: Path, two_ranks: tuple[TrainingSpec, RunFolder]
) -> None:
    one = train(spec_of(tmp_path, tiny_model_folder, ranks=1))
    _, two = two_ranks
    for row, other in zip(losses(one), losses(two), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert compute_path_difference(one, two, start=tiny_model_folder) < 0.02


def left_behind(folder: Path) -> list[psutil.Process]:
    found = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise:5:1", "ValueError on rank 1: planned fault"),
        ("forward:5:1", "rank 1: the worker was killed by SIGKILL|Connection"),
    ],
    ids=["raised", "killed"],
)
def test_a_failed_rank_terminates_all_ranks_and_resume_is_bit_identical(
    tmp_path: Path,
    two_ranks: tuple[TrainingSpec, RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
) -> None:
    spec, whole = two_ranks
    again = spec.model_copy(update={"folder": str(tmp_path / "again")})
    monkeypatch.setattr(supervisor, "WORKER_MODULE", "tests.support.faulty_worker")
    monkeypatch.setenv("LIKENESS_TEST_FAULT", fault)
    with pytest.raises(TrainingFailed, match=message):
        run_worker(again, on_event=lambda event: None)
    assert left_behind(tmp_path) == []
    assert not RunFolder(again.path).result.exists()
    if fault.startswith("raise"):
        return  # the resume is the same whatever ended the run
    monkeypatch.delenv("LIKENESS_TEST_FAULT")
    run = train(again)
    assert json.loads(run.result.read_text())["start_step"] == 3
    assert run.losses.read_text() == whole.losses.read_text()
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_fsdp_training_matches_data_parallel_and_resumes_bit_identically(
    tmp_path: Path,
    tiny_model_folder: Path,
    two_ranks: tuple[TrainingSpec, RunFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, plain = two_ranks

    def sharded(name: str, **changes: int) -> TrainingSpec:
        validation = make_config(ValidationSettings, validation_steps=4, keep="best", **changes)
        training = spec.training.model_copy(update={"fsdp": True, "validation": validation})
        return spec.model_copy(update={"training": training, "folder": str(tmp_path / name)})

    whole = train(sharded("whole", sample_steps=8, sample_num_inference_steps=2))
    for row, other in zip(losses(plain), losses(whole), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert compute_path_difference(plain, whole, start=tiny_model_folder) < 0.02
    assert (whole.samples / "step-00000008.png").is_file()
    # Losses alone would be equal without sharding too.
    assert re.search(r"[1-9]\d* parameters are sharded over 2 ranks", whole.log.read_text())

    cut = sharded("cut")  # drawing samples takes long on sharded CPUs, and leaves training as it is
    monkeypatch.setattr(supervisor, "WORKER_MODULE", "tests.support.faulty_worker")
    monkeypatch.setenv("LIKENESS_TEST_FAULT", "forward:5:1")
    with pytest.raises(TrainingFailed):
        run_worker(cut, on_event=lambda event: None)
    monkeypatch.delenv("LIKENESS_TEST_FAULT")
    run = train(cut)
    assert json.loads(run.result.read_text())["start_step"] == 3
    assert run.losses.read_text() == whole.losses.read_text()
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_a_stalled_rank_terminates_all_ranks(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, tiny_model_folder, ranks=2)
    patient = spec.training.model_copy(update={"stall_seconds": 20.0})
    monkeypatch.setattr(supervisor, "WORKER_MODULE", "tests.support.faulty_worker")
    monkeypatch.setenv("LIKENESS_TEST_FAULT", "stop:2:1")
    with pytest.raises(TrainingFailed, match=r"rank \d ran no forward pass for 20 s after step"):
        run_worker(spec.model_copy(update={"training": patient}), on_event=lambda event: None)
    assert not RunFolder(spec.path).result.exists()
    assert left_behind(tmp_path) == []


def test_two_nodes_train_bit_identically_to_two_ranks_of_one_node(
    tmp_path: Path, two_ranks: tuple[TrainingSpec, RunFolder], free_port: int
) -> None:
    spec, whole = two_ranks
    nodes = {"num_devices": 1, "num_nodes": 2, "rdzv_endpoint": f"127.0.0.1:{free_port}"}
    again = spec.model_copy(
        update={"folder": str(tmp_path / "nodes"), "training": spec.training.model_copy(update=nodes)}
    )
    run = RunFolder(again.path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port}", "--rdzv-id", spec.stage_key,
        "-m", "tasks.training.process.worker", str(run.spec),
    ]  # fmt: skip
    with (tmp_path / "second.log").open("wb") as log:
        second = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        run_worker(again, on_event=lambda event: None)
        assert second.wait(60) == 0
    finally:
        second.kill()
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())
