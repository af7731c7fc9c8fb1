"""`likeness up --s3 --postgres`: the servers of others that a stack keeps its data on."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import httpx
import psutil
import pytest
from PIL import Image

from flows.cli.stack.processes import stop
from flows.cli.stack.stack import PREFECT, WORKER, read_state
from flows.runs.records import list_summaries
from tasks.services.config import StoreConfig
from tests.stack.commands import ROOT, environment, likeness

PORTS = ("--prefect-port", "0", "--mlflow-port", "0", "--reports-port", "0")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def endpoint(s3_config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server, as AWS's own tools are pointed at one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(s3_config.endpoint_url))
    return str(s3_config.endpoint_url)


def check_second_up(folder: Path, url: str) -> None:
    """A worker that died is started again by an `up` without options, on the same bucket."""
    worker = read_state(folder / "runs").find(WORKER)
    assert worker is not None
    stop(worker)
    refused = likeness(folder, "up", *PORTS, "--s3", f"{url}/other")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    again = likeness(folder, "up", *PORTS)
    assert again.returncode == 0, again.stderr
    worker = read_state(folder / "runs").find(WORKER)
    assert worker is not None
    assert psutil.Process(worker.pid).environ()["LIKENESS_STORE_URL"] == url


def read_manifest(url: str, key: str) -> str:
    """Return the manifest of a training below an address in the bucket."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    found = client.get_object(Bucket=bucket, Key=f"{prefix}/03-training/{key}/manifest.json")
    return str(found["Body"].read().decode())


def check_champion(folder: Path, screen: str, *, url: str) -> None:
    """The run's model is made the champion, and loads as the README says, by whoever reaches the server alone."""
    [exports] = re.findall(r"export ((?:\w+=\S+ ?)+)$", screen, re.MULTILINE)
    variables = dict(word.split("=", 1) for word in exports.split())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        promoted = likeness(folder, "promote", "--force")
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    readme = (ROOT / "README.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "@champion" in block]
    without = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
    place = folder / "elsewhere"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(folder)"], cwd=place, capture_output=True, text=True, check=False,
        timeout=600, env={**without, "MLFLOW_TRACKING_URI": variables["LIKENESS_TRACKING_URI"],
                          "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(place), "TMPDIR": str(place)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = Path(done.stdout.splitlines()[-1])
    [summary] = list_summaries(folder / "runs")
    digest = hashlib.sha256((loaded / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert digest in read_manifest(url, summary.stages["training"].key)  # what was trained
    with Image.open(place / "fish.png") as image:
        assert len(image.getcolors(image.width * image.height) or ()) > 100


def check_database(folder: Path) -> None:
    """The deployments are in the database, which is no file here, and its password is in no log."""
    server = read_state(folder / "runs").find(PREFECT)
    assert server is not None
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}/api", timeout=60, trust_env=False) as client:
        found = client.post("/deployments/filter", json={}).json()
        assert "personalize-many" in {deployment["name"] for deployment in found}
    assert list((folder / "runs").rglob("prefect.db")) == []
    for path in (folder / "runs" / "stack" / "logs").iterdir():
        check_no_password(path.read_text(errors="replace"))


def check_no_password(text: str) -> None:
    assert "p%40ss" not in text
    assert "p@ss" not in text


def test_a_submitted_run_keeps_its_objects_in_the_bucket_and_its_states_in_postgres(
    s3_config: StoreConfig, endpoint: str, database_url: str, tmp_path: Path
) -> None:
    url = f"s3://{s3_config.bucket}/team/one"
    try:
        up = likeness(tmp_path, "up", *PORTS, "--s3", url, "--postgres", database_url)
        assert up.returncode == 0, up.stderr
        assert f"objects   {url}; " in up.stdout
        check_no_password(up.stdout + up.stderr)
        done = likeness(tmp_path, "submit", "experiment=smoke", "training.num_threads=1")
        assert done.returncode == 0, done.stdout + done.stderr
        check_champion(tmp_path, up.stdout, url=url)
        check_second_up(tmp_path, url)
        if database_url:  # PostgreSQL is installed
            check_database(tmp_path)
    finally:
        down = likeness(tmp_path, "down")
    assert "Prefect server" in down.stdout, down.stderr
    [summary] = list_summaries(tmp_path / "runs")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_config.bucket)
    keys = {item["Key"] for page in pages for item in page.get("Contents", ())}
    assert {key.split("/")[0] for key in keys} == {"team"}
    assert f"team/one/03-training/{summary.stages['training'].key}/manifest.json" in keys
    artifacts = [key for key in keys if key.startswith("team/one/mlflow/")]
    assert any(key.endswith("/artifacts/report/index.html") for key in artifacts)
    assert any("/artifacts/model/" in key for key in artifacts)
    assert not (tmp_path / "runs" / "store").exists()
    assert not (tmp_path / "runs" / "artifacts").exists()
    if not database_url:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql): the stack ran on SQLite")


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("s3://nowhere-at-all", 2, "bucket nowhere-at-all does not exist"),
        ("http://127.0.0.1:9000/bucket", 2, "--s3 takes s3://BUCKET or s3://BUCKET/PREFIX"),
        ("s3://UPPER", 2, "--s3 takes s3://BUCKET"),
    ],
)
def test_a_wrong_bucket_is_one_line_and_leaves_nothing_running(
    tmp_path: Path, url: str, code: int, message: str
) -> None:
    up = likeness(tmp_path, "up", *PORTS, "--s3", url)
    assert (up.returncode, up.stderr.count("\n")) == (code, 1), up.stderr
    assert message in up.stderr
    assert read_state(tmp_path / "runs").processes == ()


def test_missing_credentials_and_a_server_that_is_down_are_one_line_each(
    s3_config: StoreConfig, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    down = likeness(tmp_path, "up", *PORTS, "--s3", f"s3://{s3_config.bucket}")
    assert (down.returncode, down.stderr.count("\n")) == (4, 1), down.stderr
    assert "S3 did not answer for bucket" in down.stderr
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    without = likeness(tmp_path, "up", *PORTS, "--s3", f"s3://{s3_config.bucket}")
    assert (without.returncode, without.stderr.count("\n")) == (2, 1), without.stderr
    assert "S3 needs credentials: set AWS_ACCESS_KEY_ID" in without.stderr


def test_an_unreachable_database_is_one_line_and_leaves_nothing_running(tmp_path: Path, free_port: int) -> None:
    url = f"postgresql+asyncpg://prefect:secret@127.0.0.1:{free_port}/none"
    up = likeness(tmp_path, "up", *PORTS, "--postgres", url)
    assert up.returncode == 4
    assert f"the database at 127.0.0.1:{free_port} does not answer" in up.stderr
    assert up.stderr.count("\n") == 1
    assert "secret" not in up.stderr
    assert read_state(tmp_path / "runs").processes == ()
    for wrong in ("mysql://127.0.0.1/x", "postgresql+asyncpg:///x", "nonsense"):
        refused = likeness(tmp_path, "up", "--postgres", wrong)
        assert refused.returncode == 2
        assert "--postgres takes postgresql+asyncpg://HOST:PORT/DATABASE" in refused.stderr
