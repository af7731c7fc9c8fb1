"""`likeness run --request`: the same configuration again, with changes."""

import os
import shutil
from pathlib import Path

import pytest

from conf.compose import compile_request, compute_config_digest
from conf.overrides import parse_overrides
from conf.request import RunRequest
from flows.cli.main import main
from flows.cli.run.job import check_early
from flows.cli.run.request import load_request
from flows.runs.context import make_run_folder
from tasks.errors import ConfigError

WORDS = [
    "experiment=smoke", "training.learning_rate=3e-5", "prior.class_prompt=a photo of {article} {class_noun}, a&b",
    "evaluation.prompts=['a photo of {subject}, crème brûlée']", "store.folder=~/objects", "seed=7",
]  # fmt: skip


def make_run(output: Path, request: RunRequest, *, is_trusted: bool = True) -> Path:
    return make_run_folder(output, compile_request(request), request, is_trusted=is_trusted)


def digest_of(request: RunRequest) -> str:
    return compute_config_digest(compile_request(request))


def test_a_repeated_request_has_the_original_configuration_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = parse_overrides([*WORDS, f"output_dir={tmp_path}"])
    folder = make_run(tmp_path, original)
    for named in (folder / "request.json", folder):
        stored = load_request([], named)
        assert stored.request == original
        assert digest_of(stored.request) == digest_of(original)
    assert main(["run", "--request", str(folder / "request.json"), "--dry-run"]) == 0
    assert digest_of(original) in capsys.readouterr().out.splitlines()[0]


def test_a_request_of_a_moved_run_folder_uses_the_new_output_dir(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", parse_overrides([f"output_dir={tmp_path / 'a'}"]))
    shutil.move(folder, tmp_path / "b" / folder.name)
    config = compile_request(load_request([], tmp_path / "b" / folder.name).request)
    assert config.output_dir == str(tmp_path / "b")


def test_overrides_take_precedence_over_a_stored_request(tmp_path: Path) -> None:
    folder = make_run(tmp_path, parse_overrides([*WORDS, f"output_dir={tmp_path}"]))
    changed = load_request(["seed=8", "experiment=none", "training.max_train_steps=9"], folder).request
    same = parse_overrides(
        [*WORDS, f"output_dir={tmp_path}", "seed=8", "experiment=none", "training.max_train_steps=9"]
    )
    assert digest_of(changed) == digest_of(same)


def test_a_seed_replaces_that_of_a_form_or_of_a_sweep(tmp_path: Path) -> None:
    folder = make_run(tmp_path, RunRequest(seed=7, settings={"output_dir": str(tmp_path)}))
    assert compile_request(load_request(["seed=8"], folder).request).seed == 8
    assert compile_request(load_request([], folder).request).seed == 7


def test_overrides_take_precedence_over_request_fields(tmp_path: Path) -> None:
    form = RunRequest(subject="folder", source="photos", class_noun="mug", settings={"output_dir": str(tmp_path)})
    folder = make_run(tmp_path, form)
    config = compile_request(load_request(["subject.source=others", "subject.class_noun=fish"], folder).request)
    assert (config.subject.source, config.subject.class_noun) == ("others", "fish")
    config = compile_request(load_request(["subject=demo"], folder).request)
    assert (config.subject.source, config.subject.class_noun) == ("demo", "fish")


def test_a_request_from_a_deployment_stays_untrusted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, parse_overrides([f"output_dir={tmp_path}"]), is_trusted=False)
    assert not load_request([], folder).is_trusted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read"),
        (b"", "not JSON"),
        (b"\xff\x00\x9b", "not JSON"),
        (b'{"run_id": "x"}', "content_sha256"),
        (b"[" * 100_000, "request.json"),
    ],
)
def test_a_damaged_or_foreign_request_file_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    file = tmp_path / "some.json"
    if content is not None:
        file.write_bytes(content)
    assert main(["run", "--request", str(file)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"ConfigError: {file}")
    assert message in shown
    assert shown.count("\n") == 1


def test_a_modified_request_file_is_rejected(tmp_path: Path) -> None:
    file = make_run(tmp_path, parse_overrides([f"output_dir={tmp_path}", "seed=7"])) / "request.json"
    file.write_text(file.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(ConfigError, match=r"--request takes the request\.json of a run's folder"):
        load_request([], file)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a huge file"])
def test_a_request_file_that_never_ends_is_refused_unread(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "request.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2_000_000)
    with pytest.raises(ConfigError, match="is not a file of at most 1,000,000 bytes"):
        load_request([], path)


def test_encoders_of_the_drawn_world_are_doubted_for_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"output_dir={tmp_path}", "llm.judge=local", "tracking=none"]
    check_early(compile_request(parse_overrides(words)))
    assert capsys.readouterr().err == ""
    other = ["diffusion=sd15", "llm.profiles.local.base_url=http://127.0.0.1:9/v1", "evaluation/encoders=mini"]
    check_early(compile_request(parse_overrides([*words, *other])))
    assert "warning: the mini encoders know the drawn world alone" in capsys.readouterr().err
    check_early(compile_request(parse_overrides([*words, *other[:2], "evaluation/encoders=paper"])))
    assert capsys.readouterr().err == ""
