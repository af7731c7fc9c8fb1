"""Work pools on a real Prefect server: the templates are accepted, validate job variables, and give runnable jobs."""

import asyncio
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from flows.cli.stack.registration import BULK_PRIORITY, TAG
from flows.subjects.dispatch import BULK_QUEUE
from tests.support.cli_sandbox import CliSandbox, serve_prefect

ROOT = Path(__file__).resolve().parents[2]
POOLS = ROOT / "deployments/pools"
IMAGE = "registry.example.com/likeness@sha256:" + "a" * 64
TYPES = ("process", "docker", "kubernetes")
TEMPLATES = ("docker", "kubernetes")
pytestmark = pytest.mark.timeout(900)  # nine commands of Prefect's, of seconds each
SERVER = "http://prefect-server:4200/api"
DEPLOYMENT = "personalize-subject/personalize-subject"


@dataclass(frozen=True)
class Registered:
    """A Prefect server on which all three pools were registered in turn."""

    client: SyncPrefectClient
    job_variables: dict[str, dict[str, Any]]
    """Of the deployment, by type of pool."""


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    """A server of its own: registration creates automations, which would act on the runs of other tests."""
    folder = tmp_path_factory.mktemp("pools")
    with serve_prefect(folder) as url, temporary_settings({PREFECT_API_URL: url}):
        environment = CliSandbox(folder, url).environment() | {"LIKENESS_IMAGE": IMAGE}
        with get_client(sync_client=True) as client:
            found = {}
            for kind in TYPES:
                words = [sys.executable, "-m", "deployments.register", kind]
                done = subprocess.run(
                    words,
                    cwd=ROOT,
                    env=environment | {"LIKENESS_POOL": kind},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout + done.stderr
                deployment = client.read_deployment_by_name(DEPLOYMENT)
                assert deployment.work_pool_name == kind
                found[kind] = deployment.job_variables
            yield Registered(client, found)


def read_template(kind: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((POOLS / f"{kind}.json").read_text())
    return template


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_server_stores_the_template_as_it_is(registered: Registered, kind: str) -> None:
    pool = registered.client.read_work_pool(kind)
    assert pool.type == kind
    assert pool.base_job_template == read_template(kind)


def test_every_pool_gets_the_deployments_with_the_shared_store_and_tracking(registered: Registered) -> None:
    assert registered.job_variables == {kind: {"image": IMAGE} for kind in TYPES}
    for name in (DEPLOYMENT, "score-pending/score-pending"):
        deployment = registered.client.read_deployment_by_name(name)
        assert TAG in deployment.tags and not any(schedule.active for schedule in deployment.schedules)
    request = registered.client.read_deployment_by_name(DEPLOYMENT).parameters["request"]
    assert request == {"store": "shared", "tracking": "server"}
    form = json.dumps(registered.client.read_deployment_by_name(DEPLOYMENT).parameter_openapi_schema)
    assert '"shared"' in form and '"server"' in form, "the form lists the operator's options"


@pytest.mark.parametrize("kind", TYPES)
def test_every_pool_serves_runs_of_many_subjects_after_single_ones(registered: Registered, kind: str) -> None:
    default, bulk = (
        registered.client.read_work_queue_by_name(name, work_pool_name=kind) for name in ("default", BULK_QUEUE)
    )
    assert (default.priority, bulk.priority) == (1, BULK_PRIORITY)


def test_registering_again_creates_no_second_automation(registered: Registered) -> None:
    automations = registered.client.request("POST", "/automations/filter", json={}).json()
    names = [automation["name"] for automation in automations]
    assert len(names) == len(set(names)) == 2


@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("docker", {"device_requests": []}),
        ("docker", {"shm_size": "16g", "networks": ["likeness_services"], "env": {"LIKENESS_REGION": "eu-west-1"}}),
        ("kubernetes", {"gpus": 0}),
        ("kubernetes", {"gpus": 8, "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}),
    ],
)
def test_a_run_may_set_the_variables_of_its_pool(registered: Registered, kind: str, variables: dict[str, Any]) -> None:
    run = create_run(registered, kind, variables)
    assert run.job_variables == variables


@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("docker", {"privileged": True}),
        ("docker", {"shm_size": "lots"}),
        ("kubernetes", {"gpus": -1}),
        ("kubernetes", {"gpus": "two"}),
        ("kubernetes", {"termination_grace_period_seconds": 1}),
        ("kubernetes", {"service_account_name": "cluster-admin"}),
        ("kubernetes", {"shared_memory": "8 GB"}),
    ],
)
def test_the_server_refuses_variables_that_the_template_does_not_have(
    registered: Registered, kind: str, variables: dict[str, Any]
) -> None:
    with pytest.raises(PrefectHTTPStatusError) as caught:
        create_run(registered, kind, variables)
    assert caught.value.response.status_code == 422


def create_run(registered: Registered, kind: str, variables: dict[str, Any]) -> FlowRun:
    """Create a run of a deployment to a pool; no worker takes it."""
    client = registered.client
    flow = client.create_flow_from_name("personalize-subject")
    deployment = client.create_deployment(
        flow_id=flow, name=f"on-{kind}", work_pool_name=kind, job_variables={"image": IMAGE}
    )
    return client.create_flow_run_from_deployment(deployment, job_variables=variables)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_placeholder_is_a_variable_and_every_variable_is_used(kind: str) -> None:
    template = read_template(kind)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_image_has_to_be_named(kind: str) -> None:
    variables = read_template(kind)["variables"]
    assert variables["required"] == ["image"] and "default" not in variables["properties"]["image"]


def test_a_default_is_no_secret_and_a_stopped_container_reschedules_its_run() -> None:
    for kind in TEMPLATES:
        default = read_template(kind)["variables"]["properties"]["env"]["default"]
        if kind == "docker":  # a kubernetes worker sets it itself
            assert default.pop("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR") == "reschedule"
        for name, value in default.items():
            assert value == f"{{{{ ${name} }}}}", "a reference to the worker's environment"


def render(configuration: type[Any], kind: str, values: dict[str, Any]) -> Any:
    """Return a job as a worker prepares it."""
    run = FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="a-run")

    async def resolve() -> Any:
        async with get_client() as client:
            return await configuration.from_template_and_values(read_template(kind), values, client=client)

    job = asyncio.run(resolve())
    job.prepare_for_flow_run(run)
    return job


def test_a_docker_job_reads_secrets_from_its_worker_and_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pytest.importorskip("prefect_docker.worker", reason="pip install prefect-docker")
    from docker.types import HostConfig

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the worker")
    with temporary_settings({PREFECT_API_URL: SERVER}):
        job = render(worker.DockerWorkerJobConfiguration, "docker", {"image": IMAGE, "env": {"LIKENESS_REGION": "x"}})
    assert job.env["AWS_SECRET_ACCESS_KEY"] == "of the worker" and job.env["LIKENESS_REGION"] == "x"
    options = job.container_create_kwargs
    host = HostConfig(version="1.47", **{key: value for key, value in options.items() if key != "user"})
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]] and host["ShmSize"] == 8 << 30
    assert host["CapDrop"] == ["ALL"] and host["ReadonlyRootfs"] is True
    assert options["user"] == "10001:10001" and not job.privileged


@pytest.mark.parametrize("public", ["https://prefect.example.com", ""])
def test_a_docker_job_links_to_the_addresses_that_its_worker_has_for_people(
    monkeypatch: pytest.MonkeyPatch, public: str
) -> None:
    worker = pytest.importorskip("prefect_docker.worker", reason="pip install prefect-docker")
    monkeypatch.setenv("LIKENESS_MLFLOW_URL", "https://mlflow.example.com")
    monkeypatch.delenv("LIKENESS_REPORTS_URL", raising=False)
    settings = {PREFECT_API_URL: SERVER} | ({PREFECT_UI_URL: public} if public else {})
    with temporary_settings(settings):
        job = render(worker.DockerWorkerJobConfiguration, "docker", {"image": IMAGE})
    assert job.env["LIKENESS_MLFLOW_URL"] == "https://mlflow.example.com"
    assert job.env["LIKENESS_REPORTS_URL"] == ""
    # A worker passes its settings on. One that has none must not pass an empty one: Prefect would make no link.
    assert job.env.get("PREFECT_UI_URL", "") == public and ("PREFECT_UI_URL" in job.env) == bool(public)


def test_a_kubernetes_job_is_valid_and_refers_to_secrets() -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="pip install prefect-kubernetes")
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    with temporary_settings({PREFECT_API_URL: SERVER, PREFECT_API_AUTH_STRING: "user:secret"}):
        job = render(worker.KubernetesWorkerJobConfiguration, "kubernetes", {"image": IMAGE})
    # Prefect requires both in the pod, where Kubernetes ignores them.
    pod = job.job_manifest["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    variables = {item["name"]: item for item in pod["containers"][0]["env"]}
    assert variables["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"]["value"] == "reschedule"
    # The worker replaces its own value by the Secret that these two settings name, when it creates the job.
    deployed = (ROOT / "deployments/kubernetes/base/worker.yaml").read_text()
    (reference,) = [
        item["valueFrom"]["secretKeyRef"]
        for item in read_template("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
            "containers"
        ][0]["env"]
    ]
    assert f"API_AUTH_STRING_SECRET_NAME, value: {reference['name']}" in deployed
    assert f"API_AUTH_STRING_SECRET_KEY, value: {reference['key']}" in deployed
    replace = worker.KubernetesWorker._replace_env_variable_with_secret
    asyncio.run(replace(None, "PREFECT_API_AUTH_STRING", job, reference["name"], reference["key"]))
    assert "user:secret" not in json.dumps(job.job_manifest)
    validate(job.job_manifest, "1.35", strict=True)


def test_a_kubernetes_job_outlives_the_grace_of_a_flow_run_and_of_training() -> None:
    from conf.defaults import read_defaults

    properties = read_template("kubernetes")["variables"]["properties"]
    grace = properties["termination_grace_period_seconds"]
    # Prefect kills a flow run 30 s after SIGTERM; before that, training has its own grace period to save.
    assert read_defaults()["training"]["grace_seconds"] < 30 < grace["minimum"] <= grace["default"]


def test_no_setting_of_this_process_leaks_into_a_template() -> None:
    text = "".join((POOLS / f"{kind}.json").read_text() for kind in TEMPLATES)
    assert os.path.expanduser("~/") not in text and str(ROOT) not in text
