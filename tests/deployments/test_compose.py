"""The compose stack: valid, healthy before it is depended upon, on loopback, without a secret in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import make_secrets
from deployments.images import pin_digests
from flows.cli.stack.stack import LEASES, POOL

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deployments/compose.yaml"
TEXT = FILE.read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^{}]*))?\}")
"""A variable without another one in its default."""
ONE_SHOT = {"buckets", "register"}
SECRET_NAME = re.compile(r"PASSWORD|SECRET|API_KEY|AUTH_STRING")


def given() -> dict[str, str]:
    """Return what the two environment files define."""
    digests = {
        f"{name}_{kind}": value
        for name, image in pin_digests.read_images()
        for kind, value in (("DIGEST", "sha256:" + "a" * 64), ("IMAGE", f"{image}@sha256:{'a' * 64}"))
    }
    return {**digests, **{name: "generated" for name in make_secrets.RANDOM}, "PREFECT_AUTH_STRING": "user:generated"}


def interpolate(text: str, values: dict[str, str]) -> str:
    """Replace variables as compose does. Raises KeyError for a required one that is not set."""

    def replace(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        return rest if kind == ":-" and name not in values else values[name]

    while VARIABLE.search(text):  # from the innermost outwards
        text = VARIABLE.sub(replace, text)
    return text


def list_variables(text: str) -> list[tuple[str, str, str]]:
    """Return name, kind and default of all variables, those in defaults too; a default within is left out of it."""
    found = []
    while inner := VARIABLE.findall(text):
        found += inner
        text = VARIABLE.sub("DEFAULT", text)
    assert "$" not in text
    return found


STACK: dict[str, Any] = yaml.safe_load(interpolate(TEXT, given()))
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
EACH = pytest.mark.parametrize("name", SERVICES)


def test_the_stack_parses_as_the_compose_specification_says() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="pip install compose-spec")
    plain = {key: value for key, value in STACK.items() if not key.startswith("x-")}
    # A tag beside a digest is valid; this parser knows either.
    text = re.sub(r":[\w.-]+@sha256", "@sha256", yaml.safe_dump(plain))
    parsed = compose_spec.PyCompose.from_yaml(text)
    assert sorted(parsed.service_names()) == sorted(SERVICES)


def test_a_variable_is_required_or_has_a_default() -> None:
    for name, kind, rest in list_variables(TEXT):
        assert kind, f"{name} is neither required nor has a default"
        assert rest or name.endswith("_API_KEY"), f"{name} does not say how to set it"


def test_two_commands_write_every_required_variable() -> None:
    required = {name for name, kind, _ in list_variables(TEXT) if kind == ":?"}
    assert required <= set(given())
    assert set(make_secrets.RANDOM) <= required, "no secret is generated in vain"


@EACH
def test_a_service_that_runs_on_has_a_health_check(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
        assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])


@EACH
def test_a_dependency_is_waited_for_until_it_is_ready(name: str) -> None:
    for other, condition in SERVICES[name].get("depends_on", {}).items():
        expected = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
        assert condition["condition"] == expected


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_service_that_runs_on_waits_for_each_one_shot_service(profile: str) -> None:
    """Else `up --wait` takes the end of a one-shot service for a failure."""
    active = [service for service in SERVICES.values() if profile in service.get("profiles", [profile])]
    assert {other for service in active for other in service.get("depends_on", {})} >= ONE_SHOT


@EACH
def test_a_port_is_bound_to_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


@EACH
def test_an_image_has_a_version_and_those_of_others_a_digest(name: str) -> None:
    service = SERVICES[name]
    image = service["image"]
    assert "latest" not in image and re.search(r":\d", image)
    assert "build" in service or "@sha256:" in image


@EACH
def test_no_secret_stands_in_the_file(name: str) -> None:
    environment = yaml.safe_load(TEXT)["services"][name].get("environment", {})
    for key, value in environment.items():
        if SECRET_NAME.search(key) and not key.endswith("_FILE"):
            assert VARIABLE.fullmatch(value), f"{key} is no reference"


@EACH
def test_a_service_has_limits_rotated_logs_and_no_new_privileges(name: str) -> None:
    service = SERVICES[name]
    assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])
    assert service["logging"]["options"]["max-size"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    if "build" in service:
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]


@EACH
def test_every_folder_that_an_image_of_ours_writes_is_mounted(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        mounted = {volume.split(":")[1] for volume in service.get("volumes", ())} | set(service["tmpfs"])
        assert {"/tmp", "/var/lib/likeness"} <= mounted


@EACH
def test_networks_volumes_secrets_and_configurations_are_declared(name: str) -> None:
    service = SERVICES[name]
    assert set(service["networks"]) <= set(STACK["networks"])
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert source in STACK["volumes"] or source.startswith(("/", "."))
    assert set(service.get("secrets", ())) <= set(STACK.get("secrets", {}))
    assert {item["source"] for item in service.get("configs", ())} <= set(STACK.get("configs", {}))


def test_only_prefect_reaches_the_database() -> None:
    assert STACK["networks"]["database"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "database" in service["networks"]} == {"postgres", "prefect"}


def test_server_and_clients_share_one_authentication_string() -> None:
    raw = yaml.safe_load(TEXT)["services"]
    server = raw["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    for name in ("register", "worker", "worker-gpu"):
        assert raw[name]["environment"]["PREFECT_API_AUTH_STRING"] == server
    assert SERVICES["prefect"]["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] == LEASES


PUBLISHED = {"PREFECT_UI_URL": "prefect", "LIKENESS_MLFLOW_URL": "mlflow"}
"""Variables of links, and the services whose published ports they name."""


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
@pytest.mark.parametrize("ports", [{}, {"PREFECT_PORT": "14200", "MLFLOW_PORT": "15000"}])
def test_links_of_a_run_open_in_a_browser_outside_the_networks(name: str, ports: dict[str, str]) -> None:
    services = yaml.safe_load(interpolate(TEXT, {**given(), **ports}))["services"]
    for variable, service in PUBLISHED.items():
        [published] = services[service]["ports"]
        assert services[name]["environment"][variable] == "http://" + published.rpartition(":")[0]
    server = services["prefect"]["environment"]
    assert server["PREFECT_UI_URL"] == services[name]["environment"]["PREFECT_UI_URL"]  # in notifications
    assert server["PREFECT_SERVER_UI_API_URL"] == f"{server['PREFECT_UI_URL']}/api"


def test_links_of_a_run_lead_to_a_reverse_proxy_where_one_is_named() -> None:
    public = {"PREFECT_UI_URL": "https://prefect.example.com", "LIKENESS_MLFLOW_URL": "https://mlflow.example.com"}
    services = yaml.safe_load(interpolate(TEXT, {**given(), **public}))["services"]
    assert public.items() <= services["worker"]["environment"].items()
    assert services["prefect"]["environment"]["PREFECT_SERVER_UI_API_URL"] == "https://prefect.example.com/api"


def test_the_s3_identities_are_valid_and_only_reach_their_own_bucket() -> None:
    identities = {item["name"]: item for item in json.loads(STACK["configs"]["s3_identities"]["content"])["identities"]}
    assert set(identities) == {"admin", "likeness", "mlflow"}
    for name in ("likeness", "mlflow"):
        assert {action.split(":")[1] for action in identities[name]["actions"]} == {name}
    for name, user in (("buckets", "admin"), ("mlflow", "mlflow"), ("worker", "likeness")):
        environment = SERVICES[name]["environment"]
        (credentials,) = identities[user]["credentials"]
        assert environment["AWS_ACCESS_KEY_ID"] == credentials["accessKey"]
    assert SERVICES["buckets"]["command"][2:] == ["likeness", "mlflow"]
    assert SERVICES["worker"]["environment"]["LIKENESS_BUCKET"] == "likeness"


def test_only_the_s3_port_of_seaweedfs_is_reachable() -> None:
    command = SERVICES["seaweedfs"]["command"]
    assert "-ip.bind=127.0.0.1" in command and "-s3.ip.bind=0.0.0.0" in command


def test_a_worker_has_time_to_save_and_shared_memory() -> None:
    for name in ("worker", "worker-gpu"):
        service = SERVICES[name]
        assert service["command"][:3] == ["python", "-m", "deployments.images.drain"]
        assert service["command"][service["command"].index("--pool") + 1] == POOL
        # The worker itself, then its flow runs: 40 s each at most, see flows/cli/stack/processes.py.
        assert int(service["stop_grace_period"].removesuffix("s")) > 2 * 40
        assert service["shm_size"] == "8gb"


def test_profiles_choose_a_worker_and_one_of_them_has_a_gpu() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"worker": ["cpu"], "worker-gpu": ["gpu"]}
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["worker-gpu"]["build"]["target"] == "cuda" and SERVICES["worker"]["build"]["target"] == "cpu"


@EACH
def test_every_file_of_a_command_exists(name: str) -> None:
    service = SERVICES[name]
    words = [*service.get("command", ()), *service.get("healthcheck", {}).get("test", ())]
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file()
        if word.startswith("deployments."):
            assert (ROOT / f"{word.replace('.', '/')}.py").is_file()
