"""The container image: its Dockerfile's rules, its build context, and the programs inside it."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments import make_secrets, setup_environment
from deployments.images import check_health, create_buckets, pin_digests
from tasks.services.config import StoreConfig

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deployments/images"
SECRET = re.compile(r"password|secret|token|api_?key|credential|auth", re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    stage: str
    name: str
    text: str


def read_instructions() -> list[Instruction]:
    """Return the instructions in order, continued lines joined, each with the stage that it belongs to."""
    lines = [line for line in (IMAGES / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found, stage = [], ""
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, text = line.partition(" ")
        if name == "FROM":
            stage = text.split(" AS ")[1]
        found.append(Instruction(stage, name, text.strip()))
    return found


INSTRUCTIONS = read_instructions()
STAGES = {item.stage: item.text.split(" AS ")[0] for item in INSTRUCTIONS if item.name == "FROM"}
TARGETS = ("cpu", "cuda")


def of_stage(stage: str, name: str = "") -> list[Instruction]:
    return [item for item in INSTRUCTIONS if item.stage == stage and name in ("", item.name)]


def list_copies() -> list[Instruction]:
    """Return the COPY instructions that read from the build context."""
    return [item for item in INSTRUCTIONS if item.name == "COPY" and "--from=" not in item.text]


def test_every_stage_is_built_on_one_base_image_pinned_by_digest() -> None:
    outside = {base for base in STAGES.values() if base not in STAGES}
    assert outside == {"${PYTHON_IMAGE}@${PYTHON_DIGEST}"}
    arguments = {item.text.split("=")[0]: item.text for item in INSTRUCTIONS if item.name == "ARG" and not item.stage}
    assert re.search(r":3\.\d+-slim-\w+$", arguments["PYTHON_IMAGE"])
    assert "=" not in arguments["PYTHON_DIGEST"], "a digest is looked up, not invented"


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_ends_as_a_user_that_is_not_root(target: str) -> None:
    last = of_stage(target)[-1]
    assert last.name == "USER" and re.fullmatch(r"[1-9]\d*:[1-9]\d*", last.text)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_starts_through_tini_and_has_a_health_check(target: str) -> None:
    assert STAGES[target] == "runtime"
    assert [item.text for item in of_stage("runtime", "ENTRYPOINT")] == ['["/usr/bin/tini", "--"]']
    assert of_stage("runtime", "LABEL")
    (check,) = of_stage(target, "HEALTHCHECK")
    assert (ROOT / re.findall(r'"([^"]+\.py)"', check.text)[0]).is_file()


def test_both_targets_differ_in_their_environment_alone() -> None:
    shared = [[item.text for item in of_stage(target) if "environment-" not in item.text] for target in TARGETS]
    gpu = [item.text for item in of_stage("cuda", "ENV")]
    assert gpu and [text for text in shared[1] if text not in gpu][1:] == shared[0][1:]
    for target in TARGETS:
        copied = [item.text for item in of_stage(target, "COPY") if "--from=" in item.text]
        assert copied == [f"--from=environment-{target} /opt/likeness/.venv .venv"]


def test_nothing_is_added_from_an_address() -> None:
    assert [item for item in INSTRUCTIONS if item.name == "ADD"] == []
    assert not any(re.search(r"\b(curl|wget)\b", item.text) for item in INSTRUCTIONS)


def test_no_argument_or_variable_is_a_secret() -> None:
    names = [
        name
        for item in INSTRUCTIONS
        if item.name in ("ARG", "ENV", "LABEL")
        for name in re.findall(r"([\w.]+)(?==|$)", item.text)
    ]
    assert "PYTHON_DIGEST" in names and "HF_HOME" in names
    assert [name for name in names if SECRET.search(name)] == []


def test_every_installation_checks_hashes_or_downloads_nothing() -> None:
    for item in INSTRUCTIONS:
        for command in re.split(r"&&", item.text) if item.name == "RUN" else ():
            if re.search(r"\bpip install\b", command):
                assert "--no-deps" in command
                assert "--require-hashes" in command or "--no-index" in command, command


def test_the_locks_are_those_of_the_environment_set_up() -> None:
    text = " ".join(item.text for item in of_stage("environment-cpu"))
    assert f"-r {setup_environment.RUNTIME}" in text and setup_environment.CUDA not in text
    text = " ".join(item.text for item in of_stage("environment-cuda"))
    assert f"-r {setup_environment.RUNTIME}" in text and f"-r {setup_environment.CUDA}" in text


@pytest.mark.parametrize(("name", "lock"), [("uv", setup_environment.DEV), ("torch", setup_environment.RUNTIME)])
def test_the_awk_of_the_build_prints_one_entry_of_the_lock(name: str, lock: str) -> None:
    (program,) = {
        found for item in INSTRUCTIONS for found in re.findall(r"awk '([^']*)' \S+ > \S+", item.text) if name in found
    }
    done = subprocess.run(["awk", program, lock], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == setup_environment.find_entry(lock, name)


def test_everything_that_is_copied_exists_and_is_in_the_build_context() -> None:
    rules = [line for line in (IMAGES / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    assert rules[0] == "**", "what is not listed stays out"
    allowed = {rule.removeprefix("!").removesuffix("/**") for rule in rules if rule.startswith("!")}
    copied = {source for item in list_copies() for source in item.text.split()[:-1]}
    assert {"conf", "flows", "tasks", "deployments"} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source
    assert {"**/*.env", "**/__pycache__"} <= set(rules)


def test_bytecode_is_compiled_for_dependencies_and_sources() -> None:
    assert any("UV_COMPILE_BYTECODE=1" in item.text for item in of_stage("builder", "ENV"))
    for target in TARGETS:
        assert any("python -m compileall -q conf flows tasks deployments" in item.text for item in of_stage(target))


CHILD = """
import signal, sys, time
def save(*_):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""
WORKER = """
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(60)
"""


def test_a_stopped_worker_lets_its_flow_runs_save_first(tmp_path: Path) -> None:
    """As in a container: when the first process ends, the kernel kills all that is left."""
    saved = tmp_path / "checkpoint"
    words = [sys.executable, "-m", "deployments.images.drain", sys.executable, "-c", WORKER, CHILD, str(saved)]
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not saved.with_suffix(".ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert saved.read_text() == "saved"


def test_the_exit_code_of_a_worker_that_ends_by_itself_is_passed_on() -> None:
    words = [sys.executable, "-m", "deployments.images.drain", sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(words, cwd=ROOT, check=False, timeout=60).returncode == 7


def test_a_container_is_unhealthy_while_its_address_does_not_answer(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIKENESS_HEALTH_URL", raising=False)
    assert check_health.main() == 0
    monkeypatch.setenv("LIKENESS_HEALTH_URL", f"http://127.0.0.1:{free_port}/health")
    assert check_health.main() == 1


def test_a_container_is_unhealthy_once_its_stamp_is_old_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = tmp_path / "looked"
    monkeypatch.setenv("LIKENESS_HEALTH_URL", f"file://{stamp}")
    assert check_health.main() == 1
    stamp.touch()
    assert check_health.main() == 0
    old = time.time() - check_health.MAX_AGE_SECONDS - 1
    os.utime(stamp, (old, old))
    assert check_health.main() == 1


def test_buckets_are_created_once(
    s3_config: StoreConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", str(s3_config.endpoint_url))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    create_buckets.main(["new-bucket", s3_config.bucket])
    create_buckets.main(["new-bucket"])
    expected = ["created bucket new-bucket", f"bucket {s3_config.bucket} exists", "bucket new-bucket exists"]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.fixture
def fake_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that answers with a digest, or with what is in the file."""
    (tmp_path / "docker").write_text(f'#!/bin/sh\ncat "{tmp_path}/answer"\n')
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "answer").write_text("sha256:" + "a" * 64)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(pin_digests, "FOLDER", tmp_path)
    (tmp_path / "images.txt").write_text((IMAGES / "images.txt").read_text())
    return tmp_path


def test_pinning_writes_a_digest_of_every_image(fake_docker: Path) -> None:
    assert pin_digests.main() == 0
    written = (fake_docker / "digests.env").read_text()
    assert f"PYTHON_DIGEST=sha256:{'a' * 64}\n" in written
    assert f"POSTGRES_IMAGE=docker.io/library/postgres:17.10-bookworm@sha256:{'a' * 64}\n" in written
    (argument,) = [item.text for item in INSTRUCTIONS if item.text.startswith("PYTHON_IMAGE=")]
    assert dict(pin_digests.read_images())["PYTHON"] == argument.partition("=")[2]


@pytest.mark.parametrize("answer", ["", "sha256:short", "<no value>"])
def test_an_answer_that_is_no_digest_writes_nothing(
    fake_docker: Path, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_docker / "answer").write_text(answer)
    assert pin_digests.main() == 1
    assert not (fake_docker / "digests.env").exists()
    assert "no digest of docker.io/library/python" in capsys.readouterr().err


def test_generated_secrets_are_private_different_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "compose.env"
    assert make_secrets.main(path) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    values = [line.partition("=")[2] for line in path.read_text().splitlines()]
    assert len(set(values)) == len(values) and all(len(value) >= 32 for value in values)
    before = path.read_bytes()
    assert make_secrets.main(path) == 1
    assert path.read_bytes() == before
