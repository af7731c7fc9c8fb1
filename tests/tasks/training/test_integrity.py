"""What training wrote earlier is verified when it is read back: one flipped byte, a cut tail, other shapes."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.errors import ArtifactCorrupt, StorageFull
from tasks.services.store.local import LocalStore
from tasks.stage.digests import dump_line
from tasks.training.checkpoint_io import MANIFEST, TrainingState, list_checkpoints, load_newest, save_checkpoint
from tasks.training.data.latent_cache import digest_path_of, fetch_latents, is_valid, store_latents
from tasks.training.process import worker
from tasks.training.process.supervisor import EventTail, read_result, run_worker
from tasks.training.process.worker_spec import RunFolder, TrainingSpec
from tests.support.tiny import make_spec, train_here

FINGERPRINT = {"configuration": "c"}


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty_list(data: bytes) -> bytes:
    return b"[]"


DAMAGES: list[Callable[[bytes], bytes]] = [flip, cut, empty_list]


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(folder: Path, step: int, *, size: int = 3) -> None:
    weights = {"w": torch.full((size,), float(step))}
    save_checkpoint(folder, TrainingState(step, weights, {}, {}, []), fingerprint=FINGERPRINT, num_kept=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[TrainingSpec, RunFolder]:
    folder = tmp_path_factory.mktemp("trained")
    spec = make_spec(folder, tiny_model_folder, max_train_steps=2)
    return spec, train_here(folder, tiny_model_folder, spec=spec)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [MANIFEST, "numbers.json", "weights.safetensors", "ema.safetensors"])
def test_a_damaged_checkpoint_is_quarantined_and_the_previous_one_loaded(
    tmp_path: Path, name: str, how: Callable[[bytes], bytes]
) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    damage(tmp_path / "step-00000004" / name, how)
    loaded = load_newest(tmp_path, fingerprint=FINGERPRINT)
    assert loaded is not None
    assert loaded.step == 2
    assert (tmp_path / ".bad-step-00000004").is_dir()


def test_folders_that_only_resemble_checkpoints_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in ("step-copy", "step-00000004.orig"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("is_note", [False, True])
def test_damaged_latents_are_encoded_again(
    trained: tuple[TrainingSpec, RunFolder], tmp_path: Path, is_note: bool, how: Callable[[bytes], bytes]
) -> None:
    spec, _ = trained
    store = LocalStore(tmp_path / "store")
    store_latents(store, spec)
    moved = spec.model_copy(update={"latent_folder": str(tmp_path / "latents")})
    fetch_latents(store, moved)
    path = next(iter(moved.latents_paths()))
    whole = path.read_bytes()
    damage(digest_path_of(path) if is_note else path, how)
    assert not is_valid(path)
    train_here(tmp_path, Path(spec.model_folder), spec=moved.model_copy(update={"folder": str(tmp_path / "run")}))
    assert is_valid(path)
    assert path.read_bytes() == whole


def test_cached_latents_under_another_name_are_invalid(trained: tuple[TrainingSpec, RunFolder], tmp_path: Path) -> None:
    path = next(iter(trained[0].latents_paths()))
    other = tmp_path / f"other{path.suffix}"
    shutil.copy(path, other)
    shutil.copy(digest_path_of(path), digest_path_of(other))
    assert is_valid(path)
    assert not is_valid(other)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_result_is_quarantined_and_recomputed(
    trained: tuple[TrainingSpec, RunFolder], tmp_path: Path, how: Callable[[bytes], bytes]
) -> None:
    spec, run = trained
    before = read_result(run)
    assert before is not None
    damage(run.result, how)
    assert read_result(run) is None
    assert run.result.with_name("result.json.quarantined").exists()
    assert worker.train(spec) == 0
    after = read_result(run)
    assert after is not None
    changed = {"start_step": 2, "peak_memory_bytes": after.peak_memory_bytes}
    assert after == before.model_copy(update=changed)


@pytest.mark.parametrize("name", ["losses.jsonl", "model/unet/diffusion_pytorch_model.safetensors"])
def test_a_result_with_modified_files_is_recomputed(trained: tuple[TrainingSpec, RunFolder], name: str) -> None:
    spec, run = trained
    damage(run.folder / name, flip)
    assert read_result(run) is None
    assert worker.train(spec) == 0
    assert read_result(run) is not None


def test_an_edited_result_is_recomputed(trained: tuple[TrainingSpec, RunFolder]) -> None:
    spec, run = trained
    run.result.write_text(run.result.read_text().replace('"num_steps": 2', '"num_steps": 3'))
    assert read_result(run) is None
    assert worker.train(spec) == 0


@pytest.mark.parametrize("how", [flip, cut])
def test_damaged_event_lines_are_skipped(tmp_path: Path, how: Callable[[bytes], bytes]) -> None:
    path, seen = tmp_path / "events.jsonl", list[dict[str, Any]]()
    rows = [dump_line({"event": "step", "step": step}).encode() for step in (1, 2, 3)]
    others = [b"[1]\n", b"null\n", b'{"event": []}\n', b"[" * 100_000 + b"\n"]
    path.write_bytes(rows[0] + how(rows[1]).strip() + b"\n" + b"".join(others) + rows[2])
    tail = EventTail(path, seen.append)
    tail.read()
    assert [event["step"] for event in seen] == [1, 3]
    assert tail.last_step == 3


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_training_spec_is_rejected(
    trained: tuple[TrainingSpec, RunFolder], tmp_path: Path, how: Callable[[bytes], bytes]
) -> None:
    spec, _ = trained
    path = tmp_path / "spec.json"
    worker.write_spec(path, spec)
    damage(path, how)
    with pytest.raises(ArtifactCorrupt, match="spec.json"):
        worker.main([str(path)])


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_retained_checkpoint_falls_back_to_the_next_best(
    tmp_path: Path, tiny_model_folder: Path, how: Callable[[bytes], bytes]
) -> None:
    validation = {"validation_steps": 1, "keep": "best", "metric": "loss", "save_top_k": 2}
    run = train_here(tmp_path, tiny_model_folder, max_train_steps=3, method="lora", validation=validation)
    before = read_result(run)
    assert before is not None
    run.result.unlink()
    best = run.best / f"step-{before.published_step:08d}"
    damage(best / MANIFEST, how)
    spec = make_spec(tmp_path, tiny_model_folder, max_train_steps=3, method="lora", validation=validation)
    assert worker.train(spec) == 0
    after = read_result(run)
    assert after is not None
    assert after.published_step != before.published_step
    assert "the retained checkpoint of step" in run.events.read_text()


def test_a_full_disk_is_a_one_line_error_with_path_and_size(
    tmp_path: Path, tiny_model_folder: Path, trained: tuple[TrainingSpec, RunFolder]
) -> None:
    save(tmp_path, 2)
    with small_disk(1000), pytest.raises(StorageFull, match=r"0\.\d MB for .*step-00000004 .*run again") as failure:
        save(tmp_path, 4, size=100_000)
    assert "\n" not in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    spec = make_spec(tmp_path / "latents", tiny_model_folder)
    with small_disk(1000), pytest.raises(StorageFull, match=r"MB for .*latents/.*\.safetensors"):
        train_here(tmp_path / "latents", tiny_model_folder, spec=spec)
    done, run = trained
    run.result.unlink(missing_ok=True)
    with small_disk(1000), pytest.raises(StorageFull, match=r"MB for .*/model"):
        worker.train(done)
    assert worker.train(done) == 0


def test_a_full_disk_in_the_worker_is_reported_by_the_supervisor(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder)
    with small_disk(15_000), pytest.raises(StorageFull, match=r"^no room left: 0\.\d MB for .*latents/.*safetensors"):
        run_worker(spec, on_event=lambda event: None)
