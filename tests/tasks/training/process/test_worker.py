"""The worker as a process: killed, stopped, resumed, always bit-equal in the end."""

import json
import threading
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from tasks.errors import TrainingFailed
from tasks.training.data.batches import StepBatch
from tasks.training.module import DreamBoothModule
from tasks.training.process import supervisor, worker
from tasks.training.process.supervisor import describe_exit, find_root_cause, locked, run_worker
from tasks.training.process.worker_spec import RunFolder, TrainingSpec
from tests.support.tiny import DEVICE, make_spec, train_here

STEPS = 20


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("unet/diffusion_pytorch_model", "text_encoder/model")
        for name, tensor in load_file(run.model / f"{part}.safetensors").items()
    }


def moved(spec: TrainingSpec, folder: Path) -> TrainingSpec:
    return spec.model_copy(update={"folder": str(folder)})


class InProcess(Protocol):
    def __call__(
        self, spec: TrainingSpec, *, spoil: frozenset[int] | set[int] = ..., memory_for: int = ...
    ) -> RunFolder: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Train in this process, with losses spoiled at some steps or memory for a few images only."""
    forward = DreamBoothModule.training_step

    def run(spec: TrainingSpec, *, spoil: frozenset[int] | set[int] = frozenset(), memory_for: int = 64) -> RunFolder:
        def faulty(module: DreamBoothModule, batch: StepBatch, batch_idx: int) -> dict[str, torch.Tensor]:
            if len(batch.indices) > memory_for:
                raise torch.OutOfMemoryError("too much")
            out = forward(module, batch, batch_idx)
            return {k: v * float("nan") for k, v in out.items()} if module.step + 1 in spoil else out

        monkeypatch.setattr(DreamBoothModule, "training_step", faulty)
        spec.path.mkdir(parents=True, exist_ok=True)
        run = RunFolder(spec.path)
        run.events.write_text("")
        assert worker.train(spec) == 0
        return run

    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[TrainingSpec, RunFolder]:
    """A run that nothing disturbs."""
    spec = make_spec(tmp_path_factory.mktemp("whole"), tiny_model_folder, max_train_steps=STEPS, checkpointing_steps=5)
    result = run_worker(spec, on_event=lambda event: None)
    assert result.num_steps == STEPS
    return spec, RunFolder(spec.path)


def test_a_repeatedly_killed_run_ends_bit_identical(
    tmp_path: Path, uninterrupted: tuple[TrainingSpec, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = uninterrupted
    again = moved(spec, tmp_path / "again")
    run = RunFolder(again.path)
    monkeypatch.setattr(supervisor, "WORKER_MODULE", "tests.support.faulty_worker")
    for fault in ("save:10", "drop:15"):
        monkeypatch.setenv("LIKENESS_TEST_FAULT", fault)
        with pytest.raises(TrainingFailed):
            run_worker(again, on_event=lambda event: None)
    monkeypatch.delenv("LIKENESS_TEST_FAULT")
    starts: list[int] = []
    result = run_worker(again, on_event=lambda e: starts.append(e["step"]) if e["event"] == "started" else None)
    assert starts == [result.start_step] == [15]
    first, second = weights(whole), weights(run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run.losses.read_text() == whole.losses.read_text()
    assert [json.loads(line)["step"] for line in run.losses.read_text().splitlines()] == list(range(1, STEPS + 1))


def test_training_changes_unet_and_text_encoder_and_leaves_the_vae(
    uninterrupted: tuple[TrainingSpec, RunFolder], tiny_model_folder: Path
) -> None:
    _, run = uninterrupted
    for part, is_trained in (("unet", True), ("text_encoder", True), ("vae", False)):
        name = next((tiny_model_folder / part).glob("*.safetensors")).name
        before, after = load_file(tiny_model_folder / part / name), load_file(run.model / part / name)
        assert any(not torch.equal(before[k], after[k]) for k in before) is is_trained


def test_a_finished_run_is_not_trained_again(uninterrupted: tuple[TrainingSpec, RunFolder]) -> None:
    spec, _ = uninterrupted
    events: list[dict[str, Any]] = []
    run_worker(spec, on_event=events.append)
    assert events == []


def test_an_interrupt_saves_a_checkpoint_and_the_next_run_resumes(
    tmp_path: Path, uninterrupted: tuple[TrainingSpec, RunFolder]
) -> None:
    spec, whole = uninterrupted
    again = moved(spec, tmp_path / "again")

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(again, on_event=interrupt)
    run = RunFolder(again.path)
    assert list(run.checkpoints.glob("step-*"))
    run_worker(again, on_event=lambda event: None)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_a_failing_worker_reports_its_step_and_log_file(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder)
    Path(spec.instance_images[0].path).write_bytes(b"changed")
    with pytest.raises(TrainingFailed, match=r"step 0: .*ArtifactCorrupt.*changed after it was checked.*worker.log"):
        run_worker(spec, on_event=lambda event: None)


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "lock"):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with (
        pytest.raises(TrainingFailed, match="another run holds the training lock"),
        locked(tmp_path / "lock", seconds=0.3),
    ):
        pass
    release.set()
    thread.join()


def test_a_killed_worker_is_reported_by_its_signal() -> None:
    assert describe_exit(-9) == "the worker was killed by SIGKILL, probably by the OOM killer"
    assert describe_exit(1) == "the worker exited with code 1 without a failure report"


def test_the_rank_that_a_signal_ended_is_read_from_the_log_of_torchrun(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text("loss 0.1\n")
    assert find_root_cause(log) is None
    log.write_text(
        "[1]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 10)  (SIGTERM)\n"
        "Root Cause (first observed failure):\n[0]:\n  host      : localhost\n"
        "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 11)  (SIGKILL)\n"
    )
    assert find_root_cause(log) == "rank 1: the worker was killed by SIGKILL, probably by the OOM killer"


def test_a_step_with_a_non_finite_loss_is_skipped(
    tmp_path: Path, tiny_model_folder: Path, in_process: InProcess
) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, max_train_steps=4)
    run = in_process(spec, spoil={2})
    rows = [json.loads(line) for line in run.losses.read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_too_many_non_finite_steps_stop_training_and_name_their_samples(
    tmp_path: Path, tiny_model_folder: Path, in_process: InProcess
) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, max_train_steps=8, max_skipped_steps=1)
    with pytest.raises(TrainingFailed, match=r"in 2 steps up to step 4 \(samples 4 to 7\)"):
        in_process(spec, spoil={3, 4})
    assert not RunFolder(spec.path).result.exists()


def test_out_of_memory_halves_the_micro_batch_size_and_keeps_the_samples(
    tmp_path: Path, tiny_model_folder: Path, in_process: InProcess
) -> None:
    whole = in_process(make_spec(tmp_path / "whole", tiny_model_folder, train_batch_size=4, max_train_steps=3))
    spec = make_spec(tmp_path / "halved", tiny_model_folder, train_batch_size=4, max_train_steps=3)
    halved = in_process(spec, memory_for=2)
    assert json.loads(halved.result.read_text())["micro_batch_size"] == 2
    assert "retrying with train_batch_size=2, gradient_accumulation_steps=2" in halved.events.read_text()
    first, second = ([json.loads(line) for line in r.losses.read_text().splitlines()] for r in (whole, halved))
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    with pytest.raises(TrainingFailed, match=r"out of memory with 1 instance images at a time; lower"):
        in_process(make_spec(tmp_path / "none", tiny_model_folder, train_batch_size=2), memory_for=0)


def test_weights_are_where_the_model_computes_when_the_result_is_written(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning ends by moving them to the CPU; on a GPU, trying a saved LoRA then failed."""
    moves: list[tuple[str, Any]] = []
    for name in ("to", "cpu"):
        move = getattr(DreamBoothModule, name)

        def note(module: DreamBoothModule, *place: Any, name: str = name, move: Any = move) -> Any:
            moves.append((name, place))
            return move(module, *place)

        monkeypatch.setattr(DreamBoothModule, name, note)
    device = torch.device(DEVICE)
    run = train_here(tmp_path, tiny_model_folder, method="lora", max_train_steps=2)
    assert ("cpu", ()) in moves
    assert moves[-1] == ("to", (device,))
    assert list(run.model.glob("*.safetensors"))
