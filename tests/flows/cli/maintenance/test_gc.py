"""What `likeness gc` removes, and what it never touches."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.maintenance.gc import collect_garbage, print_garbage
from flows.runs.records import read_summary, write_end, write_request, write_stages, write_start, write_summary
from tasks.errors import ConfigError, StillPending
from tasks.evaluation.sampling import BASE_SAMPLES, BaseSample
from tasks.manifests.base import Manifest
from tasks.manifests.run_summary import StageSummary, Status, make_head
from tasks.services.store.lease import make_lease
from tasks.services.store.local import LocalStore, link_or_copy
from tasks.stage.cache import StageFolder, find_manifest
from tasks.stage.digests import dump_signed

OLD = time.time() - 30 * 86_400


def make_output(tmp_path: Path, *, status: Status = "finished") -> tuple[Path, LocalStore]:
    """An output folder with one run that refers to stage `used`; nobody refers to `unused`."""
    output = tmp_path / "runs"
    folder = output / "one"
    folder.mkdir(parents=True)
    request = parse_overrides([f"output_dir={output}"])
    (folder / "config.json").write_text(compile_request(request).model_dump_json())
    write_request(folder, request, is_trusted=True)
    write_start(folder, "one")
    if status != "running":
        stages = {"prior": StageSummary(key="used")}
        write_summary(folder, make_head("one", status).model_copy(update={"stages": stages}))
    store = LocalStore(output / "store")
    for key in ("used", "unused"):
        stage = StageFolder(store, "prior", key)
        stage.put("images/0.png", b"pixels" * 1000)
        stage.finish(Manifest(**stage.head(1, counts={})))
    store.put_bytes("llm/replies/paid.json", b"{}")
    return output, store


def age(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (OLD, OLD))


def test_only_unreferenced_stages_are_removed_and_only_with_delete(tmp_path: Path) -> None:
    output, store = make_output(tmp_path)
    age(output / "store")
    listed = collect_garbage(output, days=7, is_deleting=False)
    assert [(item.kind, item.name) for item in listed] == [("prior that no run refers to", "02-prior/unused")]
    assert listed[0].size_bytes > 6000
    assert find_manifest(store, Manifest, stage="prior", key="unused") is not None
    collect_garbage(output, days=7, is_deleting=True)
    assert store.list_keys("02-prior/unused/") == []


def test_old_copies_of_a_buckets_objects_are_local_copies(tmp_path: Path) -> None:
    output, _ = make_output(tmp_path)
    (output / "store-cache").mkdir()
    for name in ("old", "new"):
        (output / "store-cache" / name).write_bytes(b"pixels")
    os.utime(output / "store-cache" / "old", (OLD, OLD))
    listed = collect_garbage(output, days=7, is_deleting=True)
    assert [Path(item.name).name for item in listed if item.kind == "local copy (bucket)"] == ["old"]
    assert [path.name for path in (output / "store-cache").iterdir()] == ["new"]


def test_notes_of_base_samples_go_with_the_evaluation_that_drew_them(tmp_path: Path) -> None:
    output, store = make_output(tmp_path)
    names = {}
    for key in ("used", "unused", "gone"):
        stage = StageFolder(store, "evaluation", key)
        image = stage.put("base/subject-00-00.png", b"pixels")
        names[key] = f"{BASE_SAMPLES}/{key}.json"
        store.put_bytes(names[key], dump_signed(BaseSample(name=names[key], image=image)))
        stage.finish(Manifest(**stage.head(1, counts={})))
    for key in store.list_keys("04-evaluation/gone/"):
        store.delete(key)
    stages = {"prior": StageSummary(key="used"), "evaluation": StageSummary(key="used")}
    write_summary(output / "one", make_head("one", "finished").model_copy(update={"stages": stages}))
    age(output / "store")
    listed = collect_garbage(output, days=7, is_deleting=True)
    assert [item.kind for item in listed].count("note of a sample that is gone") == 2
    assert store.list_keys(f"{BASE_SAMPLES}/") == [names["used"]]


def test_recent_objects_are_retained(tmp_path: Path) -> None:
    output, _ = make_output(tmp_path)
    assert collect_garbage(output, days=7, is_deleting=True) == []


def test_no_stage_is_removed_while_a_run_is_active(tmp_path: Path) -> None:
    output, store = make_output(tmp_path, status="running")
    assert collect_garbage(output, days=0, is_deleting=True) == []
    assert find_manifest(store, Manifest, stage="prior", key="unused") is not None


@pytest.mark.parametrize("status", ["pending", "failed", "killed", "cancelled"])
def test_stages_of_an_unfinished_run_are_retained(tmp_path: Path, status: Status) -> None:
    output, store = make_output(tmp_path, status="running")
    folder = output / "one"
    write_stages(folder, {"prior": "used"})
    if status == "killed":
        summary = read_summary(folder)
        assert summary.owner is not None
        owner = summary.owner.model_copy(update={"started": 1.0})
        write_summary(folder, summary.model_copy(update={"owner": owner}))
    else:
        errors = {"pending": StillPending("a job"), "failed": ConfigError("x"), "cancelled": KeyboardInterrupt()}
        write_end(folder, "one", errors[status])
    assert read_summary(folder).status == status
    age(output / "store")
    listed = collect_garbage(output, days=7, is_deleting=True)
    assert [item.name for item in listed] == ["02-prior/unused"]
    assert find_manifest(store, Manifest, stage="prior", key="used") is not None


def test_the_reason_for_retaining_stages_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = make_output(tmp_path, status="running")
    print_garbage(output, days=0, is_deleting=False)
    assert "no stage is removed: run one is running" in capsys.readouterr().out
    (output / "one" / "summary.json").write_text("{")
    print_garbage(output, days=0, is_deleting=False)
    assert "its summary.json is damaged; remove that folder" in capsys.readouterr().out


@pytest.mark.parametrize("days", [-1.0, float("nan"), float("inf")])
def test_an_invalid_days_value_is_rejected(tmp_path: Path, days: float) -> None:
    output, _ = make_output(tmp_path)
    with pytest.raises(ConfigError, match="--days"):
        collect_garbage(output, days=days, is_deleting=True)


def test_leftovers_of_interrupted_runs_are_removed(tmp_path: Path) -> None:
    output, store = make_output(tmp_path)
    part = store.root / "02-prior" / "used" / ".part-abc"
    part.write_bytes(b"x" * 100)
    training = output / "work" / "training" / "k" / "checkpoints" / "step-00000001"
    training.mkdir(parents=True)
    (training / "weights.safetensors").write_bytes(b"x" * 200)
    age(output / "work")
    fresh = store.root / ".part-fresh"
    fresh.write_bytes(b"x")
    os.utime(part, (OLD, OLD))
    kinds = {item.kind: item.size_bytes for item in collect_garbage(output, days=7, is_deleting=True)}
    assert kinds == {"abandoned temporary file": 100, "training state": 200}
    assert not part.exists()
    assert fresh.exists()
    assert not training.exists()


def test_a_leftover_is_listed_once_if_the_output_folder_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, store = make_output(tmp_path)
    part = store.root / "02-prior" / "used" / ".part-abc"
    part.write_bytes(b"x" * 100)
    os.utime(part, (OLD, OLD))
    monkeypatch.chdir(tmp_path)
    items = collect_garbage(output.relative_to(tmp_path), days=7, is_deleting=False)
    assert [item.kind for item in items] == ["abandoned temporary file"]


def test_leases_of_dead_processes_and_old_checkpoints_of_unfinished_trainings_are_removed(tmp_path: Path) -> None:
    output, store = make_output(tmp_path)
    mine = make_lease("me")
    store.put_bytes("leases/stages/prior-a/000001.json", dump_signed(mine))
    store.put_bytes("leases/stages/prior-b/000001.json", dump_signed(mine.model_copy(update={"expires_at": 0.0})))
    for name in ("weights.safetensors", "manifest.json"):
        store.put_bytes(f"02-prior/used/resume/checkpoints/step-00000002/{name}", b"x" * 100)
    age(store.root / "02-prior" / "used" / "resume")
    sizes = {item.kind: item.size_bytes for item in collect_garbage(output, days=7, is_deleting=True)}
    assert sizes == {"checkpoints of an unfinished training": 200, "lease of a process that is gone": 0}
    assert store.list_keys("leases/") == ["leases/stages/prior-a/000001.json"]
    assert find_manifest(store, Manifest, stage="prior", key="used") is not None


def test_no_stage_is_removed_if_a_summary_is_damaged(tmp_path: Path) -> None:
    output, store = make_output(tmp_path)
    (output / "one" / "summary.json").write_text("{")
    age(output / "store")
    collect_garbage(output, days=7, is_deleting=True)
    assert find_manifest(store, Manifest, stage="prior", key="used") is not None


def test_no_stage_is_removed_from_a_store_that_other_folders_may_share(tmp_path: Path) -> None:
    output, _ = make_output(tmp_path)
    shared = tmp_path / "shared"
    shutil.move(output / "store", shared)
    config = json.loads((output / "one" / "config.json").read_text())
    config["store"]["folder"] = str(shared)
    (output / "one" / "config.json").write_text(json.dumps(config))
    age(shared)
    assert collect_garbage(output, days=7, is_deleting=True) == []
    assert find_manifest(LocalStore(shared), Manifest, stage="prior", key="unused") is not None


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs in"):
        collect_garbage(tmp_path, days=0, is_deleting=True)


def test_all_copies_of_a_model_are_hard_links_to_one_inode(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    made = tmp_path / "made"
    made.write_bytes(b"weights")
    store.put_file("03-training/k/model", made)
    store.get_file("03-training/k/model", tmp_path / "local")
    store.put_file("06-publishing/k/model", tmp_path / "local")
    names = [made, store.path("03-training/k/model"), tmp_path / "local", store.path("06-publishing/k/model")]
    assert len({os.stat(name).st_ino for name in names}) == 1
    store.put_bytes("03-training/k/model", b"others!")  # replaced, not written into
    assert (tmp_path / "local").read_bytes() == b"weights"
    link_or_copy(made, tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == b"weights"
