"""`likeness run-many s3://BUCKET/PREFIX/`: a folder of the store, in that bucket."""

from pathlib import Path

import boto3
import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from conf.subjects import ManyRequest
from flows.cli.subjects.terminal import find_folder
from flows.personalize_many import personalize_many
from tasks.errors import ConfigError
from tasks.services.config import StoreConfig
from tests.support.cli_sandbox import QUICK, CliSandbox
from tests.support.tiny import draw_photos

TEAM = ["store=s3", "store.bucket=a-bucket", "store.prefix=team"]


@pytest.fixture(autouse=True)
def without_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIKENESS_STORE_URL", raising=False)


def find(url: str, *words: str) -> tuple[str, str]:
    """Return the folder and the store, as s3://BUCKET/PREFIX."""
    folder, request = find_folder(url, parse_overrides(words))
    store = compile_request(request).store
    assert store.kind == "s3"
    return folder, f"s3://{store.bucket}/{store.prefix}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://a-bucket/team/subjects/", ("store:subjects/", "s3://a-bucket/team")),
        ("s3://a-bucket/team/one/subjects", ("store:subjects/", "s3://a-bucket/team/one")),
        ("s3://a-bucket/subjects/", ("store:subjects/", "s3://a-bucket/")),
    ],
)
def test_the_store_is_the_folder_above_the_subjects(url: str, expected: tuple[str, str]) -> None:
    assert find(url) == expected
    assert find(url, "store=s3", "store.region=eu-west-1") == expected


def test_a_store_that_holds_the_folder_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://a-bucket/team/in/subjects/"
    assert find(url, *TEAM) == ("store:in/subjects/", "s3://a-bucket/team")
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")
    assert find(url) == ("store:in/subjects/", "s3://a-bucket/team")
    # Then a worker knows the bucket, and no request has to choose one.
    assert find_folder(url, RunRequest())[1].settings == {}


ODD = ("a//b/", "/x", "a/../", "a/../x/", "a/./", "..", "./x")


@pytest.mark.parametrize(
    ("url", "words", "message"),
    [
        ("s3://a-bucket", [], "name a folder of subjects in it, as s3://a-bucket/subjects/"),
        ("s3://a-bucket/team/", TEAM, "name a folder of subjects"),
        ("s3://a-bucket/teams/x/", TEAM, "s3://a-bucket/team, where"),
        (
            "s3://a-bucket/team/x/",
            ["store=s3", "store.bucket=other", "store.prefix=team"],
            "lies outside of s3://other",
        ),
        ("s3://a-bucket/team/x/", ["store=local"], "lies outside of a local store, where results go"),
        ("s3://A_BUCKET/x/", [], "run-many takes s3://BUCKET"),
        *((f"s3://a-bucket/{path}", [], "a part of the address is empty, . or ..") for path in ODD),
    ],
)
def test_a_folder_that_no_store_holds_is_refused_with_one_line(url: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        find_folder(url, parse_overrides(words))
    assert "\n" not in str(raised.value)


def upload_subject(config: StoreConfig, folder: Path, prefix: str) -> None:
    draw_photos(folder, num=1)
    (folder / "subject.yaml").write_text("class_noun: fish\n")
    client = boto3.client("s3", endpoint_url=config.endpoint_url, region_name="us-east-1")
    for path in folder.iterdir():
        client.upload_file(str(path), config.bucket, f"{prefix}/{path.name}")


def test_subjects_of_a_bucket_are_run_and_recorded_beside_them(
    sandbox: CliSandbox, s3_config: StoreConfig, tmp_path: Path
) -> None:
    upload_subject(s3_config, tmp_path / "rex", "team/subjects/rex")
    output = tmp_path / "runs"
    words = [*QUICK, f"store.endpoint_url={s3_config.endpoint_url}", f"output_dir={output}", "tracking=none"]
    url = f"s3://{s3_config.bucket}/team/subjects/"
    done = sandbox.embedded().likeness("run-many", url, *words, "--settle-seconds", "0")
    # It was found and run: one photo is too few.
    assert done.returncode == 1, done.stderr
    assert "1 subjects: 1 failed" in done.stdout and "rex: failed (SubjectRejected" in done.stderr, done.stderr
    client = boto3.client("s3", endpoint_url=s3_config.endpoint_url, region_name="us-east-1")
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=s3_config.bucket)["Contents"]]
    assert [key for key in keys if key.startswith("team/subject-runs/")]
    assert all(key.startswith("team/") for key in keys)


def test_a_deployment_reads_no_bucket_that_a_request_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "446afecd-aae1-4443-8f37-c744c69db6c2")
    with pytest.raises(ConfigError, match="lies outside the allowed folders"):
        personalize_many.fn(ManyRequest(subjects="s3://a-bucket/subjects/"))
    request = ManyRequest(subjects="store:subjects/", base=RunRequest(settings={"store.bucket": "a-bucket"}))
    with pytest.raises(ConfigError, match="store.bucket"):
        personalize_many.fn(request)
