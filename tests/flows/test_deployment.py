"""The deployment on a real Prefect server and worker, both on loopback."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_sandbox import ROOT, CliSandbox, end

CANARY = "canary-3b1f"
PREFECT = [sys.executable, "-m", "prefect"]


class Service:
    """A running Prefect server with the deployment and a worker."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self.url = url
        self.environment = environment

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"content-type": "application/json"})
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=200) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                error.close()  # it holds the connection
                # Prefect answers 503 while SQLite is locked by another write; its own client tries again too.
                if error.code != 503 or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def deployment(self) -> Any:
        return self.call("/deployments/name/personalize-subject/personalize-subject")

    def trigger(self, request: dict[str, Any]) -> Any:
        body = {"parameters": {"request": request}, "enforce_parameter_schema": True}
        return self.call(f"/deployments/{self.deployment()['id']}/create_flow_run", body)

    def wait(self, run_id: str, *, seconds: float = 200) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run = self.call(f"/flow_runs/{run_id}")
            if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return run
            time.sleep(1)
        raise AssertionError(f"flow run is still {run['state']['name']}")


@pytest.fixture(scope="module")
def service(
    sandbox: CliSandbox, first_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    assert sandbox.server_url
    environment = {**sandbox.environment(), "LIKENESS_HOME": str(ROOT), "OPENAI_API_KEY": CANARY}
    environment["PREFECT_WORKER_QUERY_SECONDS"] = "1"
    for words in (
        ["work-pool", "create", "likeness", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
    ):
        done = subprocess.run(
            [*PREFECT, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path_factory.mktemp("service") / "log").open("wb") as log:
        command = [*PREFECT, "worker", "start", "--pool", "likeness"]
        worker = subprocess.Popen(command, cwd=sandbox.folder, env=environment, stdout=log, stderr=log)
    try:
        yield Service(sandbox.server_url, environment)
    finally:
        end(worker, seconds=5)  # it would sleep out the pause before its next look


def test_the_parameter_schema_has_enums_and_descriptions(service: Service) -> None:
    schema = service.deployment()["parameter_openapi_schema"]
    definition = schema["definitions"]["RunRequest"]
    assert definition["additionalProperties"] is False
    assert {"mini", "sd15"} <= set(definition["properties"]["diffusion"]["enum"])
    assert "textual_inversion+lora" in definition["properties"]["method"]["enum"]
    assert all("description" in field for field in definition["properties"].values())


def test_the_deployment_has_a_paused_schedule(service: Service) -> None:
    schedules = service.deployment()["schedules"]
    assert [schedule["active"] for schedule in schedules] == [False]
    assert schedules[0]["schedule"]["cron"] == "0 3 * * *"


@pytest.mark.parametrize("request_", [{"sauce": "x"}, {"diffusion": "sdxx"}])
def test_an_invalid_request_is_rejected_before_a_flow_run_is_created(
    service: Service, request_: dict[str, str]
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        service.trigger(request_)
    assert caught.value.code in (409, 422)


def test_a_flow_run_through_the_api_reuses_the_stages_of_a_cli_run(
    service: Service, sandbox: CliSandbox, first_run: dict[str, Any]
) -> None:
    settings = {"output_dir": str(sandbox.output), "training.num_threads": 1}
    run = service.wait(service.trigger({"experiment": "smoke", "settings": settings})["id"])
    assert run["state"]["type"] == "COMPLETED", run["state"]
    summary = sandbox.newest()
    assert summary["run_id"] != first_run["run_id"]
    assert all(stage["cached"] for name, stage in summary["stages"].items() if name != "publishing")
    assert summary["metrics"] == first_run["metrics"]
    tasks = service.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    states = {task["name"].rsplit("-", 1)[0]: task["state_name"] for task in tasks}
    assert states["training"] == "Cached"
    keys = {artifact["key"] for artifact in service.call("/artifacts/filter", {})}
    assert {"run-fish", "metrics-fish", "stages-fish", "samples-fish"} <= keys
    assert "report-fish" not in keys  # without a report server there is no address that a browser opens
    assert "file:" not in json.dumps(service.call("/artifacts/filter", {}))
    assert re.fullmatch(r"fish-full-[0-9a-f]{6}-[0-9a-f]{4}", run["name"])


def test_a_path_outside_the_allowed_folders_fails_the_run(service: Service) -> None:
    run = service.wait(service.trigger({"settings": {"output_dir": "/"}})["id"])
    assert run["state"]["type"] == "FAILED"
    assert "lies outside the allowed folders" in run["state"]["message"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"settings": {"llm.profiles.local.capabilities.batch": "file",
                          "llm.profiles.local.batch_command": ["sh", "-c", "touch owned"],
                          "subject.batch_threshold": 2}},
            "llm.profiles.local.capabilities.batch is set in conf/ on the worker's machine",
        ),
        (
            {"source": "${oc.env:OPENAI_API_KEY}", "class_noun": "fish"},
            "'${oc.env:OPENAI_API_KEY}' lies outside the allowed folders",
        ),
        ({"settings": {"tracking.uri": "sqlite:///file:/tmp/x.db?uri=true"}}, "tracking.uri is set in conf/"),
        ({"settings": {"prior.class_prompt": "{class_noun:>2000000000}"}}, "may hold {article} and {class_noun} only"),
    ],
)  # fmt: skip
def test_a_malicious_request_fails_without_side_effects_or_leaked_secrets(
    service: Service, sandbox: CliSandbox, request_: dict[str, Any], message: str
) -> None:
    run = service.wait(service.trigger(request_)["id"])
    assert run["state"]["type"] == "FAILED"
    assert message in run["state"]["message"]
    assert CANARY not in json.dumps(run)
    assert not list(sandbox.folder.rglob("owned"))


def test_no_environment_secret_is_in_the_database_or_the_output(service: Service, sandbox: CliSandbox) -> None:
    assert service.environment["OPENAI_API_KEY"] == CANARY
    database = b"".join(path.read_bytes() for path in Path(sandbox.folder / "prefect").glob("*.db*"))
    assert b"personalize-subject" in database
    assert CANARY.encode() not in database
    for path in sandbox.output.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
