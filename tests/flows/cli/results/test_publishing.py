"""A run's model copied elsewhere: complete and verified, or without a manifest."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.main import main
from flows.cli.results import publishing
from flows.cli.results.images.credentials import load_credentials, read_manifest
from flows.cli.results.published_samples import SampleFiles, is_signed
from flows.cli.results.publishing import PUBLISHED, Destination, open_destination, publish_run
from flows.runs.records import link_model
from tasks.errors import ArtifactCorrupt, ConfigError
from tasks.images import encode_png
from tasks.manifests.publishing import Publication
from tasks.manifests.run_summary import SubjectNames, make_head
from tasks.services.config import StoreConfig
from tasks.services.store.base import Store
from tasks.services.store.open import open_store
from tasks.services.store.s3 import S3Store
from tasks.stage.cache import StageFolder, read_verified
from tests.support.certificates import write_pair
from tests.support.report import make_evaluation
from tests.support.tiny import draw_photo

PAGE = b"<html><!--downloads--><!--usage-->stored snippets<!--/usage--></html>"


class OneRun:
    """A finished run, as far as publishing reads it."""

    def __init__(self, config: StoreConfig, output: Path) -> None:
        values = compile_request(parse_overrides([]))
        self.config = values.model_copy(update={"store": config, "output_dir": str(output)})
        subject = SubjectNames(class_noun="tea pot", identifier_token="sks")
        self.summary = make_head("a-run", "finished").model_copy(update={"subject": subject})

    def find_stage_key(self, stage: str) -> str:
        assert stage in ("publishing", "evaluation")
        return "k"


def store_publication(store: Store, *, weights: bytes = b"weights") -> None:
    folder = StageFolder(store, "publishing", "k")
    report, grid = folder.put("report/index.html", PAGE), folder.put("samples.png", b"p")
    model = (folder.put("model/unet/weights.safetensors", weights), folder.put("model/README.md", b"card"))
    folder.finish(
        Publication(
            **folder.head(1, counts={}), registered_model=None, registered_version=None, tracking_run_id=None,
            report=report, sample_grid=grid, model=model, published_step=1, published_because="the last step",
        )
    )  # fmt: skip


@pytest.fixture
def config(s3_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """A store with one published run."""
    own = s3_config.model_copy(update={"kind": "local", "folder": str(tmp_path / "store")})
    store_publication(open_store(own))
    monkeypatch.setattr(publishing, "find_run", lambda output, name, **_: output / name)
    monkeypatch.setattr(publishing, "read_run", lambda folder: OneRun(own, tmp_path / "runs"))
    return own


def publish(to: str, **changes: Any) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    target = Destination(to, **changes)
    assert publish_run(Path("runs"), "a-run", target, on_progress=lambda done, total: seen.append((done, total))) == 0
    return seen


def test_a_model_is_copied_to_a_folder_and_again_without_harm(config: StoreConfig, tmp_path: Path) -> None:
    to = tmp_path / "a place"
    assert publish(str(to))[-1] == (3, 3)
    assert (to / "model" / "unet" / "weights.safetensors").read_bytes() == b"weights"
    assert (to / "report" / "index.html").is_file()
    manifest = json.loads((to / PUBLISHED).read_text())
    assert manifest["run"] == "a-run"
    assert set(manifest["files"]) == {"model/unet/weights.safetensors", "model/README.md", "report/index.html"}
    publish(str(to))


def test_a_model_is_copied_to_a_bucket(config: StoreConfig, s3_config: StoreConfig) -> None:
    publish(f"s3://{s3_config.bucket}/models/rex/")
    there = open_destination(f"s3://{s3_config.bucket}/models/rex", config, output=Path("runs"))
    assert there.find_bytes("model/README.md") == b"card"
    assert there.find_bytes(PUBLISHED) is not None


def test_a_published_report_links_the_files_beside_it_and_no_folder_of_this_machine(
    config: StoreConfig, tmp_path: Path
) -> None:
    publish(str(tmp_path / "to"))
    page = (tmp_path / "to" / "report" / "index.html").read_bytes()
    assert b'<a href="../model/">model folder</a>' in page
    assert b"stored snippets" not in page
    assert b"likeness generate model " in page
    assert str(tmp_path).encode() not in page
    manifest = json.loads((tmp_path / "to" / PUBLISHED).read_text())["files"]["report/index.html"]
    assert manifest == {"sha256": hashlib.sha256(page).hexdigest(), "size_bytes": len(page)}


def test_samples_are_copied_as_they_are_or_signed(config: StoreConfig, tmp_path: Path) -> None:
    evaluation = make_evaluation(open_store(config))
    stored = [
        read_verified(open_store(config), sample.image) for sample in evaluation.samples if sample.side == "tuned"
    ]
    to = tmp_path / "to"
    publish(str(to))
    assert not (to / "samples").exists()

    assert publish(str(to), has_samples=True)[-1] == (5, 5)
    paths = sorted((to / "samples").iterdir())
    assert [path.name for path in paths] == ["001-a-photo-of-sks-fish-1.png", "002-sks-fish-at-night-1.png"]
    assert [path.read_bytes() for path in paths] == stored

    credentials = load_credentials(*write_pair(tmp_path))
    seen = []
    for _ in range(2):  # again at the same place: another signature, and a manifest that holds
        publish(str(to), has_samples=True, credentials=credentials)
        files = json.loads((to / PUBLISHED).read_text())["files"]
        assert {path for path in files if path.startswith("samples/")} == {f"samples/{path.name}" for path in paths}
        for path in paths:
            data = path.read_bytes()
            assert read_manifest(data)["validation_state"] == "Valid"
            assert files[f"samples/{path.name}"] == {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size_bytes": len(data),
            }
        seen.append(paths[0].read_bytes())
    assert seen[0] != seen[1]

    publish(str(to))  # the samples of before stay listed
    assert json.loads((to / PUBLISHED).read_text())["files"] == files


def test_unsigned_samples_over_signed_ones_are_one_warning(
    config: StoreConfig, s3_config: StoreConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_evaluation(open_store(config))
    credentials = load_credentials(*write_pair(tmp_path))
    for to in (str(tmp_path / "to"), f"s3://{s3_config.bucket}/models/ada/"):
        publish(to, has_samples=True)
        publish(to, has_samples=True)  # unsigned over unsigned
        publish(to, has_samples=True, credentials=credentials)
        publish(to, has_samples=True, credentials=credentials)
        publish(to)  # no samples: the signed ones stay
        assert capsys.readouterr().err == ""
        publish(to, has_samples=True)
        shown = capsys.readouterr().err
        assert shown.startswith(f"warning: 2 of 2 samples in {to} have content credentials (C2PA), which these replace")
        assert shown.count("\n") == 1
        publish(to, has_samples=True)
        assert capsys.readouterr().err == "", "they are gone"


def test_pictures_that_are_no_whole_png_are_not_signed() -> None:
    whole = encode_png(draw_photo(0))
    assert not any(map(is_signed, (b"", b"caBX", whole, whole[:20], whole[:8] + b"\xff" * 20)))
    assert is_signed(whole[:33] + (4).to_bytes(4) + b"caBXdata" + bytes(4) + whole[33:])


def test_an_interrupted_copy_of_signed_samples_has_no_manifest(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_evaluation(open_store(config))
    credentials = load_credentials(*write_pair(tmp_path))
    publish(str(tmp_path / "to"), has_samples=True, credentials=credentials)
    with monkeypatch.context() as patch:
        patch.setattr(SampleFiles, "read", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(str(tmp_path / "to"), has_samples=True, credentials=credentials)
    assert not (tmp_path / "to" / PUBLISHED).exists()
    publish(str(tmp_path / "to"))  # without samples, beside what is left of them
    assert (tmp_path / "to" / PUBLISHED).exists()
    publish(str(tmp_path / "to"), has_samples=True, credentials=credentials)
    assert (tmp_path / "to" / PUBLISHED).exists()


def test_samples_go_along_where_they_are_asked_for_and_are_signed_with_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chain, key = map(str, write_pair(tmp_path))
    given: list[tuple[bool, bool]] = []

    def note(output: Path, name: str, target: Destination, **named: Any) -> int:
        given.append((target.has_samples, target.credentials is not None))
        return 0

    monkeypatch.setattr(publishing, "publish_run", note)
    words = ["publish", "a-run", "--to", "there"]
    assert main(words) == main([*words, "--samples"]) == 0
    assert main([*words, "--samples", "--c2pa-certificate", chain, "--c2pa-key", key]) == 0
    assert main([*words, "--c2pa-certificate", chain, "--c2pa-key", key]) != 0
    assert "--c2pa-certificate signs samples; add --samples" in capsys.readouterr().err
    # Set for `likeness generate`.
    monkeypatch.setenv("LIKENESS_C2PA_CERTIFICATE", chain)
    monkeypatch.setenv("LIKENESS_C2PA_KEY", key)
    assert main(words) == main([*words, "--samples"]) == 0
    assert given == [(False, False), (True, False), (True, True), (False, False), (True, True)]


def test_a_report_in_a_bucket_names_no_folder_of_this_machine(
    config: StoreConfig, s3_config: StoreConfig, tmp_path: Path
) -> None:
    publish(f"s3://{s3_config.bucket}/models/max/")
    there = open_destination(f"s3://{s3_config.bucket}/models/max", config, output=Path("runs"))
    page = there.find_bytes("report/index.html") or b""
    assert b'<a href="../model/">model folder</a>' in page
    command = f"aws s3 cp --recursive s3://{s3_config.bucket}/models/max/model model"
    assert command.encode() in page
    assert (b"--endpoint-url" in page) is (config.endpoint_url is not None)
    assert str(tmp_path).encode() not in page


def test_another_model_at_the_destination_is_not_overwritten(config: StoreConfig, tmp_path: Path) -> None:
    publish(str(tmp_path / "to"))
    store_publication(open_store(config), weights=b"other weights")
    with pytest.raises(ConfigError, match="already contains another model"):
        publish(str(tmp_path / "to"))
    assert (tmp_path / "to" / "model" / "unet" / "weights.safetensors").read_bytes() == b"weights"


def test_without_all_files_there_is_no_manifest(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def copy_damaged(source: Path, target: Path) -> None:
        copy(source, target)
        if Path(source).name == "README.md":
            Path(target).write_bytes(b"damaged")

    monkeypatch.setattr(shutil, "copyfile", copy_damaged)
    with pytest.raises(ArtifactCorrupt, match="checksum mismatch at the destination; publish again"):
        publish(str(tmp_path / "to"))
    assert not (tmp_path / "to" / PUBLISHED).exists()
    monkeypatch.setattr(shutil, "copyfile", copy)
    publish(str(tmp_path / "to"))
    assert (tmp_path / "to" / PUBLISHED).exists()


def test_a_file_damaged_on_its_way_to_a_bucket_is_found(
    config: StoreConfig, s3_config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, put = f"s3://{s3_config.bucket}/models/bo/", S3Store.put_file

    def put_damaged(store: S3Store, key: str, path: Path) -> None:
        if key.endswith("README.md"):
            path = path.with_name("damaged")  # the bucket then has the checksum of what was sent
            path.write_bytes(b"damaged")
        put(store, key, path)

    monkeypatch.setattr(S3Store, "put_file", put_damaged)
    with pytest.raises(ArtifactCorrupt, match=r"README.md: checksum mismatch at the destination; publish again"):
        publish(to)
    there = open_destination(to, config, output=Path("runs"))
    assert there.find_bytes(PUBLISHED) is None
    monkeypatch.setattr(S3Store, "put_file", put)
    publish(to)
    assert there.find_bytes(PUBLISHED) is not None


@pytest.mark.parametrize(
    "to", ["http://x/y", "s3://UPPER/x", "gs://bucket", "", " ", "s3:/bucket/x", "file:/x", "a\x1b[0m", "a\0"]
)
def test_a_destination_of_another_kind_is_refused(config: StoreConfig, tmp_path: Path, to: str) -> None:
    with pytest.raises(ConfigError, match="give a folder or s3://BUCKET/PREFIX"):
        open_destination(to, config, output=tmp_path)


@pytest.mark.parametrize(
    "to",
    ["store", "store/06-publishing/k", "runs/one", "runs/one/model", "link", "runs/work/x", "runs/store", ".", "runs"],
)
def test_a_destination_that_overlaps_a_store_or_a_run_is_refused(config: StoreConfig, tmp_path: Path, to: str) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "request.json").write_text("{}")
    stored = next((tmp_path / "store").rglob("README.md"))
    (run / "model").symlink_to(stored.parent)
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ConfigError, match=r"overlaps .*; choose a folder elsewhere"):
        publish(str(tmp_path / to))
    assert stored.read_bytes() == b"card"
    publish(str(tmp_path / "runs" / "published"))


def test_a_prefix_that_overlaps_the_store_is_refused(s3_config: StoreConfig) -> None:
    own = s3_config.model_copy(update={"prefix": "a/b"})
    for prefix in ("", "a", "a/b", "a/b/c"):
        with pytest.raises(ConfigError, match="overlaps the run's store"):
            open_destination(f"s3://{own.bucket}/{prefix}", own, output=Path("runs"))
    open_destination(f"s3://{own.bucket}/a/bc", own, output=Path("runs"))
    whole = s3_config.model_copy(update={"prefix": ""})
    open_destination(f"s3://{own.bucket}/models", whole, output=Path("runs"))
    with pytest.raises(ConfigError, match="overlaps the run's store"):
        open_destination(f"s3://{own.bucket}/06-publishing", whole, output=Path("runs"))


def test_a_symbolic_link_inside_the_destination_is_not_followed(config: StoreConfig, tmp_path: Path) -> None:
    to, elsewhere = tmp_path / "to", tmp_path / "elsewhere"
    to.mkdir()
    elsewhere.mkdir()
    (to / "model").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a symbolic link; remove it"):
        publish(str(to))
    assert not list(elsewhere.iterdir())


def test_editing_a_published_file_leaves_the_store_as_it_was(config: StoreConfig, tmp_path: Path) -> None:
    publish(str(tmp_path / "to"))
    card, stored = tmp_path / "to" / "model" / "README.md", next((tmp_path / "store").rglob("README.md"))
    assert card.stat().st_ino != stored.stat().st_ino
    assert card.stat().st_mode & 0o777 == 0o644
    card.write_bytes(b"edited")
    assert stored.read_bytes() == b"card"


def test_a_folder_with_other_files_is_refused_and_an_interrupted_copy_resumes(
    config: StoreConfig, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    (to / "model").mkdir(parents=True)
    (to / "model" / "README.md").write_bytes(b"begun")
    publish(str(to))
    assert (to / "model" / "README.md").read_bytes() == b"card"
    (to / PUBLISHED).unlink()
    (to / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty \(notes.txt\)"):
        publish(str(to))
    (to / PUBLISHED).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="already contains another model"):
        publish(str(to))
    with pytest.raises(ConfigError, match="give a folder that can be written"):
        publish(str(to / "notes.txt"))


def test_files_are_staged_one_at_a_time_in_the_output_folder(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count_staged(done: int, total: int) -> None:
        seen.append(sum(path.is_file() for path in (tmp_path / "runs" / "work").rglob("*")))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    publish_run(Path("runs"), "a-run", Destination(str(tmp_path / "to")), on_progress=count_staged)
    assert seen == [0, 0, 0, 0]
    assert not list((tmp_path / "runs" / "work").iterdir())


def test_a_runs_folder_links_its_model_and_both_may_move(tmp_path: Path) -> None:
    (tmp_path / "runs" / "store" / "model").mkdir(parents=True)
    run = tmp_path / "runs" / "one"
    run.mkdir()
    for _ in range(2):
        link_model(run, "../store/model")
    link_model(tmp_path / "runs", "s3://bucket/model")
    assert not (tmp_path / "runs" / "model").is_symlink()
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert (moved / "one" / "model").resolve() == moved / "store" / "model"
