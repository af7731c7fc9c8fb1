"""What a run's folder says of it, in whatever state it was left."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from conf.compose import compile_request, compute_config_digest
from conf.overrides import parse_overrides
from flows.cli.results.runs import print_runs
from flows.runs.records import (
    link_model,
    list_summaries,
    place_model,
    read_request,
    read_run,
    read_summary,
    relocate,
    suggest_next,
    to_overrides,
    write_end,
    write_report,
    write_request,
    write_start,
    write_summary,
)
from tasks.errors import ArtifactCorrupt, ConfigError, StillPending, TrainingStopped
from tasks.manifests.run_summary import RunError, RunPaths, make_head
from tasks.publishing.report.placement import DOWNLOADS, LINEAGE
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tasks.stage.digests import sign
from tests.support.summary import make_measured_summary

WORDS = [
    "subject.source=Fotos/Söhne & co", "subject.class_noun=mug", "experiment=smoke", "prior=none", "seed=4",
    'evaluation.prompts=["{subject}","{subject}, at night"]', "training.snr_gamma=null", "subject.is_profiled=false",
]  # fmt: skip


def make_run(output: Path, name: str) -> Path:
    folder = output / name
    folder.mkdir(parents=True)
    write_request(folder, parse_overrides(WORDS), is_trusted=True)
    write_start(folder, name)
    return folder


def test_a_request_round_trips_through_command_line_overrides() -> None:
    import shlex

    request = parse_overrides(WORDS)
    again = parse_overrides(shlex.split(" ".join(to_overrides(request))))
    assert compute_config_digest(compile_request(again)) == compute_config_digest(compile_request(request))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "cancelled"),
        (TrainingStopped("saved"), "cancelled"),
        (StillPending("a job"), "pending"),
        (ConfigError("wrong"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_the_error_determines_the_status_of_a_run(tmp_path: Path, error: BaseException, status: str) -> None:
    folder = make_run(tmp_path, "one")
    assert read_summary(folder).status == "running"
    write_end(folder, "one", error)
    assert read_summary(folder).status == status
    words = suggest_next(read_summary(folder), folder)
    assert words == "likeness pending" if status == "pending" else words.startswith("likeness run ")


def test_a_prefect_cancellation_is_recorded_as_cancelled(tmp_path: Path) -> None:
    from prefect.exceptions import TerminationSignal

    folder = make_run(tmp_path, "one")
    write_end(folder, "one", TerminationSignal(signal=signal.SIGTERM))
    assert read_summary(folder).status == "cancelled"


def test_a_running_run_without_a_live_process_is_reported_as_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.runs.records import write_start\n"
        "write_start(Path(sys.argv[1]), 'one')"
    )
    folder = make_run(tmp_path, "one")
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=Path(__file__).parents[3])
    assert read_summary(folder).status == "killed"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["owner"]["pid"] != os.getpid()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"status": 3, "run_id": "x"}', b"[" * 100_000])
def test_a_damaged_summary_affects_only_its_own_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    torn, whole = make_run(tmp_path, "torn"), make_run(tmp_path, "whole")
    (torn / "summary.json").write_bytes(damage)
    write_end(whole, "whole", ConfigError("some reason"))
    summaries = list_summaries(tmp_path)
    assert [summary.status for summary in summaries] == ["failed", "damaged"]
    print_runs(summaries, folder=tmp_path)
    printed = capsys.readouterr().out
    assert "damaged: likeness run " in printed
    assert "ConfigError: some reason" in printed


def test_any_flipped_byte_or_truncation_of_summary_or_request_is_detected(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one")
    for name in ("summary.json", "request.json"):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole) - 1, 11):  # the last byte may be a line's end
            flipped = bytearray(whole)
            flipped[place] ^= 1
            for damaged in (bytes(flipped), whole[:place]):
                (folder / name).write_bytes(damaged)
                if name == "summary.json":
                    assert read_summary(folder).status == "damaged"
                else:
                    with pytest.raises(ArtifactCorrupt, match="start the run again"):
                        read_request(folder)
        (folder / name).write_bytes(whole)


def test_summary_paths_follow_a_moved_run_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "one")
    paths = RunPaths(report="report.html", model="../store/m", manifests={"prior": "s3://bucket/m.json"})
    write_summary(folder, read_summary(folder).model_copy(update={"status": "finished", "paths": paths}))
    assert str(tmp_path) not in (folder / "summary.json").read_text()
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    [summary] = list_summaries(tmp_path / "moved")
    assert summary.paths is not None
    assert summary.paths.model == str(tmp_path / "moved" / "store" / "m")
    assert summary.paths.manifests["prior"] == "s3://bucket/m.json"


@pytest.mark.parametrize("store", ["", "mine"])
def test_a_copied_output_folder_never_writes_to_the_original(tmp_path: Path, store: str) -> None:
    original, copy = tmp_path / "runs", tmp_path / "copy"
    words = [f"output_dir={original}", *([f"store.folder={original / store}"] if store else [])]
    request = parse_overrides(words)
    folder = original / "one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(compile_request(request).model_dump_json())
    write_request(folder, request, is_trusted=False)
    write_summary(folder, make_head("one", "failed"))
    shutil.copytree(original, copy)
    assert relocate(request, folder) == request
    for config in (read_run(copy / "one").config, compile_request(relocate(request, copy / "one"))):
        assert config.output_dir == str(copy)
        assert config.store.folder == str(copy / (store or "store"))
    assert str(original) not in suggest_next(read_summary(copy / "one"), copy / "one")


def test_a_store_outside_the_output_folder_is_not_relocated(tmp_path: Path) -> None:
    request = parse_overrides([f"output_dir={tmp_path / 'runs'}", f"store.folder={tmp_path / 'shared'}"])
    folder = tmp_path / "copy" / "one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(compile_request(request).model_dump_json())
    assert read_run(folder).config.store.folder == str(tmp_path / "shared")
    assert compile_request(relocate(request, folder)).store.folder == str(tmp_path / "shared")


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": ["subject"]}, {"stages": {"subject": "key"}}, {"stages": {"prior": {"key": "../../x"}}},
        {"wall_seconds": "long"}, {"metrics": []}, {"metrics": {"tuned": {"dino": "x"}}}, {"error": "text"},
        {"paths": []}, {"paths": {"report": None}}, {"status": "fai\x1b[31mled"}, {"run_id": "../etc"},
        {"wall_seconds": float("inf")},
    ],
)  # fmt: skip
def test_a_summary_with_invalid_fields_is_damaged(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = make_run(tmp_path, "one")
    summary = {**make_head("one", "finished").model_dump(mode="json", exclude_unset=True), **fields}
    try:
        (folder / "summary.json").write_text(json.dumps(sign(summary)))
    except ValueError:  # JSON has no infinity, but a parser reads what is too large as one
        text = json.dumps({**summary, "content_sha256": "0" * 64})
        (folder / "summary.json").write_text(text.replace("Infinity", "3e999"))
    [read] = list_summaries(tmp_path)
    assert read.status == "damaged"
    print_runs([read], folder=tmp_path)


def test_an_error_message_of_only_control_characters_becomes_the_error_type(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one")
    write_end(folder, "one", ValueError("\x07\n"))
    assert read_summary(folder).error == RunError(kind="ValueError", message="ValueError")


def test_a_configuration_modified_after_the_run_is_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    config = compile_request(parse_overrides([]))
    text = config.model_dump_json()
    (folder / "config.json").write_text(text)
    write_start(folder, "one", compute_config_digest(config))
    write_end(folder, "one", ConfigError("x"))
    assert read_run(folder).config.seed == config.seed
    (folder / "config.json").write_text(text.replace('"seed":', '"seed":1', 1))
    with pytest.raises(ConfigError, match="was changed after the run"):
        read_run(folder)


def test_the_list_of_runs_shows_means_with_their_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_runs([make_measured_summary("run-1"), make_head("run-2", "finished")], folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[0].strip() == "run-1"
    assert "0.71 [0.66, 0.75]" in lines[1] and "3.50 [3.00, 3.90]" in lines[1] and " 0.30 " in lines[1]
    assert lines[2].split() == ["run-2", "finished"]


def test_the_report_beside_the_model_links_to_its_files(tmp_path: Path, store: LocalStore) -> None:
    folder = StageFolder(store, "publishing", "k")
    page = f"<html><body>{DOWNLOADS}<p>&lt;!--downloads--&gt;</p>{LINEAGE}</body></html>"
    names = ("a b.safetensors", "unet/w.safetensors", "README.md", "lineage.json")
    model = tuple(folder.put(f"model/{name}", b"x") for name in names)
    run = tmp_path / "run"
    run.mkdir()
    write_report(run, page, model)
    assert (run / "report.html").read_text() == page  # no model is linked here
    link_model(run, str(store.root / "06-publishing" / "k" / "model"))
    write_report(run, page, model)
    found = re.findall(r'href="([^"]+)"', (run / "report.html").read_text())
    assert found == ["model/", "model/a%20b.safetensors", "model/lineage.json"]
    assert (run / unquote(found[1])).read_bytes() == b"x"


def test_readers_of_a_report_find_the_model_by_its_link_or_fetch_it_from_the_bucket(tmp_path: Path) -> None:
    run = tmp_path / "run s" / "run-1"
    (tmp_path / "run s" / "store" / "model").mkdir(parents=True)
    run.mkdir()
    unlinked = place_model(run, "../store/model")
    assert unlinked.folder == f"{tmp_path}/run s/store/model"  # a file system without links
    link_model(run, "../store/model")
    linked = place_model(run, "../store/model")
    assert (linked.folder, linked.comment) == (f"{run}/model", "")
    assert (linked.run, linked.output) == ("run-1", str(run.parent))
    fetched = place_model(run, "s3://bucket/06-publishing/k/model")
    assert fetched.folder == "run-1/model"
    assert shlex.split(fetched.comment) == [
        "likeness", "publish", "run-1", "--to", "run-1", "--output-dir", str(run.parent),
    ]  # fmt: skip
