"""The worker as a process: killed, stopped, resumed, always bit-equal in the end."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.errors import TrainingFailed
from tasks.training.spec import RunFolder, TrainingSpec
from tasks.training.supervisor import EventTail, find_reason, locked, run_worker, start
from tests.tiny import make_spec


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("unet/diffusion_pytorch_model", "text_encoder/model")
        for name, tensor in load_file(run.model / f"{part}.safetensors").items()
    }


def moved(spec: TrainingSpec, folder: Path) -> TrainingSpec:
    return spec.model_copy(update={"folder": str(folder)})


def kill_at_step(spec: TrainingSpec, step: int) -> None:
    """Start the worker and end its whole group with SIGKILL once it reports a step."""
    run = RunFolder(spec.path)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.spec.write_text(spec.model_dump_json())
    run.events.write_text("")
    process = start(spec, run)
    seen: list[dict[str, Any]] = []
    tail = EventTail(run.events, seen.append)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        tail.read()
        if any(event["event"] == "step" and event["step"] >= step for event in seen):
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[TrainingSpec, RunFolder]:
    """A run that nothing disturbs."""
    spec = make_spec(tmp_path_factory.mktemp("whole"), tiny_model_folder, max_train_steps=150, checkpoint_every_steps=5)
    result = run_worker(spec, on_event=lambda event: None)
    assert result["num_steps"] == 150
    return spec, RunFolder(spec.path)


def test_a_run_that_was_killed_twice_ends_bit_equal(
    tmp_path: Path, uninterrupted: tuple[TrainingSpec, RunFolder]
) -> None:
    spec, whole = uninterrupted
    again = moved(spec, tmp_path / "again")
    kill_at_step(again, 7)
    kill_at_step(again, 31)
    starts: list[int] = []
    result = run_worker(again, on_event=lambda e: starts.append(e["step"]) if e["event"] == "started" else None)
    run = RunFolder(again.path)
    assert 30 <= result["start_step"] < 150
    assert starts == [result["start_step"]]
    first, second = weights(whole), weights(run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run.losses.read_text() == whole.losses.read_text()
    assert [json.loads(line)["step"] for line in run.losses.read_text().splitlines()] == list(range(1, 151))


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


def test_an_interrupt_saves_and_the_next_run_goes_on(
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


def test_a_worker_that_fails_names_step_and_log(tmp_path: Path, tiny_model_folder: Path) -> None:
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
    with pytest.raises(TrainingFailed, match="another run is training"), locked(tmp_path / "lock", seconds=0.3):
        pass
    release.set()
    thread.join()


def test_a_silent_end_is_said_to_be_one(tmp_path: Path) -> None:
    assert "killed or ended without a word" in find_reason(tmp_path / "none.log")
