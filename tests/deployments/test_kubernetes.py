"""Kubernetes manifests: valid against the API's schemas, least privilege, consistent with image and work pool."""

import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.images import pin_digests
from flows.cli.stack.stack import LEASES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deployments/kubernetes"
BASE = FOLDER / "base"
USER = "10001"
API_VERSION = "1.35"


def load_all(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


LISTED: list[str] = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
OBJECTS = [item for name in LISTED for item in load_all(BASE / name)]
TRAINING = load_all(FOLDER / "pytorchjob.yaml")[0]
JOB = json.loads((ROOT / "deployments/pools/kubernetes.json").read_text())["job_configuration"]["job_manifest"]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in OBJECTS if item["kind"] == kind}


def list_pods() -> dict[str, dict[str, Any]]:
    """Return every pod template: of the deployments, of the pool's jobs and of the training over several machines."""
    pods = {name: item["spec"]["template"] for name, item in of_kind("Deployment").items()}
    replicas = TRAINING["spec"]["pytorchReplicaSpecs"]
    pods |= {f"training {name}": replica["template"] for name, replica in replicas.items()}
    return {**pods, "job": JOB["spec"]["template"]}


PODS = list_pods()
EACH_POD = pytest.mark.parametrize("name", PODS)


def container_of(name: str) -> dict[str, Any]:
    (container,) = PODS[name]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_every_manifest_is_listed() -> None:
    assert {path.name for path in BASE.glob("*.yaml")} == {*LISTED, "kustomization.yaml"}


@pytest.mark.parametrize(
    "index", range(len(OBJECTS)), ids=lambda i: f"{OBJECTS[i]['kind']}/{OBJECTS[i]['metadata']['name']}"
)
def test_a_manifest_is_valid(index: int) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    validate(OBJECTS[index], API_VERSION, strict=True)


@pytest.mark.parametrize("name", ["training Master", "training Worker"])
def test_a_pod_of_the_training_is_valid(name: str) -> None:
    """The API's schemas do not have the operator's own resource, but its pods are the API's."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": PODS[name]["spec"]}
    validate(pod, API_VERSION, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", ["base", "overlays/example"])
def test_kustomize_renders(folder: str) -> None:
    words = ["kubectl", "kustomize", str(FOLDER / folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rendered = [item for item in yaml.safe_load_all(done.stdout) if item]
    assert len(rendered) == len(OBJECTS)
    assert all(item["kind"] == "Namespace" or item["metadata"]["namespace"] == "likeness" for item in rendered)
    if folder != "base":
        assert "registry.example.com/likeness:0.1.0-cpu" in done.stdout and "image: likeness:" not in done.stdout


@EACH_POD
def test_a_pod_is_restricted(name: str) -> None:
    """What the `restricted` pod security standard demands, and a root file system that is read-only."""
    pod = PODS[name]["spec"]
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    container = container_of(name)["securityContext"]
    assert container["allowPrivilegeEscalation"] is False and container["readOnlyRootFilesystem"] is True
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_the_namespace_enforces_it() -> None:
    labels = of_kind("Namespace")["likeness"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@EACH_POD
def test_a_pod_runs_as_the_user_of_the_image_and_its_folders_are_mounted(name: str) -> None:
    dockerfile = (ROOT / "deployments/images/Dockerfile").read_text()
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == [f"{USER}:{USER}"] * 2
    assert str(PODS[name]["spec"]["securityContext"]["runAsUser"]) == USER
    mounted = {mount["mountPath"] for mount in container_of(name)["volumeMounts"]}
    volumes = {volume["name"] for volume in PODS[name]["spec"]["volumes"]}
    assert {mount["name"] for mount in container_of(name)["volumeMounts"]} == volumes
    home = "/home/prefect" if name == "likeness-worker" else "/var/lib/likeness"
    assert {"/tmp", home} <= mounted
    if "job" in name or "training" in name:
        assert {"/dev/shm", "/opt/likeness/runs"} <= mounted


@EACH_POD
def test_a_pod_has_requests_limits_and_a_grace_period(name: str) -> None:
    resources = container_of(name)["resources"]
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(resources[kind])
    assert "terminationGracePeriodSeconds" in PODS[name]["spec"]
    if "training" in name:
        assert PODS[name]["spec"]["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", sorted(of_kind("Deployment").keys() - {"likeness-watchdog"}))
def test_a_server_has_probes_on_a_port_that_it_names(name: str) -> None:
    container = container_of(name)
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports


def test_the_watchdogs_probe_reads_the_stamp_that_it_writes() -> None:
    container = container_of("likeness-watchdog")
    stamp = container["args"][container["args"].index("--stamp") + 1]
    assert {"name": "LIKENESS_HEALTH_URL", "value": f"file://{stamp}"} in container["env"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        command = container[probe]["exec"]["command"]
        assert (ROOT / command[-1]).is_file()


@EACH_POD
def test_a_secret_is_a_reference(name: str) -> None:
    for item in container_of(name).get("env", ()):
        if re.search(r"AUTH_STRING$|CONNECTION_URL|PASSWORD|API_KEY$", item["name"]):
            assert list(item["valueFrom"]) == ["secretKeyRef"]


def list_references() -> set[str]:
    """Return the names of all Secrets that pods refer to."""
    text = json.dumps(list(PODS.values()))
    return set(re.findall(r'"secret(?:Key)?Ref": \{"name": "([\w-]+)"', text))


def test_the_example_of_secrets_names_all_of_them_and_holds_no_value() -> None:
    text = (FOLDER / "secrets.example.env").read_text()
    for line in text.splitlines():
        assert line.startswith("#") or line.endswith("="), line
    assert of_kind("Secret") == {}
    assert list_references() == {"prefect-auth", "prefect-database", "likeness-s3", "likeness-llm", "mlflow-s3"}
    for name in list_references():
        assert name in text


@EACH_POD
def test_an_image_has_a_version_that_is_not_latest(name: str) -> None:
    image = container_of(name)["image"]
    if name != "job":  # a variable of the pool
        assert re.search(r":\d+\.\d+", image) and "latest" not in image
    if name == "likeness-worker":
        assert image == dict(pin_digests.read_images())["PREFECT_KUBERNETES"]


def test_only_the_worker_has_access_to_the_kubernetes_api() -> None:
    with_token = {name for name, pod in PODS.items() if pod["spec"].get("automountServiceAccountToken") is not False}
    assert with_token == {"likeness-worker"}
    assert set(of_kind("ClusterRole")) == set()
    accounts = {pod["spec"]["serviceAccountName"] for pod in PODS.values()}
    assert accounts == set(of_kind("ServiceAccount"))
    (binding,) = of_kind("RoleBinding").values()
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "likeness-worker"}]


def test_the_role_grants_exactly_what_the_worker_calls() -> None:
    """Derived from the calls of prefect-kubernetes; calls on Secrets belong to settings that are off here."""
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="pip install prefect-kubernetes")
    from prefect_kubernetes import observer

    source = inspect.getsource(worker) + inspect.getsource(observer)
    verbs = {
        "create": "create",
        "delete": "delete",
        "list": "list",
        "read": "get",
        "patch": "patch",
        "replace": "update",
    }
    resources = {"job": "jobs", "pod": "pods", "pod_log": "pods/log"}
    calls = re.findall(r"\.(create|delete|list|read|patch|replace)_namespaced_(\w+)\(", source)
    assert {kind for _, kind in calls} == {*resources, "secret"}
    needed = {(resources[kind], verbs[verb]) for verb, kind in calls if kind in resources}
    # kopf lists and watches both kinds, and its handlers of events patch nothing.
    needed |= {(kind, verb) for kind in ("jobs", "pods") for verb in ("list", "watch")}
    (role,) = of_kind("Role").values()
    granted = {(kind, verb) for rule in role["rules"] for kind in rule["resources"] for verb in rule["verbs"]}
    assert granted == needed


def test_the_worker_watches_its_own_namespace_and_keeps_its_home_to_itself() -> None:
    variables = {item["name"]: item for item in container_of("likeness-worker")["env"]}
    observed = variables["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"]
    assert observed["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert "PREFECT_HOME" not in variables, "a worker passes its own settings on to its jobs"


def test_traffic_is_denied_by_default_and_every_rule_selects_a_pod_that_exists() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    existing = [pod.get("metadata", {}).get("labels", {}) for pod in PODS.values()]
    for policy in policies.values():
        for selector in re.findall(r'"podSelector": (\{"matchLabels": \{[^}]*\}\})', json.dumps(policy)):
            wanted = json.loads(selector)["matchLabels"].items()
            assert any(wanted <= labels.items() for labels in existing), selector


def test_services_and_addresses_agree() -> None:
    services = {name: item["spec"] for name, item in of_kind("Service").items()}
    data = of_kind("ConfigMap")["likeness"]["data"]
    for name, key in (("prefect-server", "PREFECT_API_URL"), ("mlflow", "LIKENESS_TRACKING_URI")):
        (port,) = services[name]["ports"]
        assert data[key].startswith(f"http://{name}:{port['port']}")
        assert services[name]["selector"].items() <= PODS[name]["metadata"]["labels"].items()
    hosts = next(word for word in container_of("mlflow")["args"] if word.startswith("--allowed-hosts="))
    assert "mlflow:5000" in hosts.partition("=")[2].split(",")


def test_links_of_a_run_open_in_a_browser_outside_the_cluster() -> None:
    data = of_kind("ConfigMap")["likeness"]["data"]
    for key, service in (("PREFECT_UI_URL", "prefect-server"), ("LIKENESS_MLFLOW_URL", "mlflow")):
        (port,) = of_kind("Service")[service]["spec"]["ports"]
        assert data[key] == f"http://127.0.0.1:{port['port']}"  # as `kubectl port-forward` serves it
        assert f"/data/{key}," in (FOLDER / "overlays/example/kustomization.yaml").read_text()
    assert {"configMapRef": {"name": "likeness"}} in container_of("job")["envFrom"]
    # Not in the worker: it would pass the setting on to its jobs, as a value that is fixed in their manifests.
    assert "PREFECT_UI_URL" not in {item["name"] for item in container_of("likeness-worker")["env"]}
    server = {item["name"]: item for item in container_of("prefect-server")["env"]}
    names = list(server)
    assert server["PREFECT_SERVER_UI_API_URL"]["value"] == "$(PREFECT_UI_URL)/api"
    assert names.index("PREFECT_UI_URL") < names.index("PREFECT_SERVER_UI_API_URL"), "Kubernetes expands earlier ones"
    assert server["PREFECT_UI_URL"]["valueFrom"]["configMapKeyRef"] == {"name": "likeness", "key": "PREFECT_UI_URL"}


def test_no_pod_creates_a_concurrency_limit_of_its_own_name() -> None:
    """A pod sees the GPUs that it was given; a limit of as many slots would hold back the other pods of its node."""
    assert of_kind("ConfigMap")["likeness"]["data"]["LIKENESS_HOST_LIMIT"] == ""


def test_claims_and_configurations_that_pods_use_exist() -> None:
    text = json.dumps(list(PODS.values()))
    assert set(re.findall(r'"claimName": "([\w-]+)"', text)) == set(of_kind("PersistentVolumeClaim"))
    assert set(re.findall(r'"configMap(?:Key)?Ref": \{"name": "([\w-]+)"', text)) == set(of_kind("ConfigMap"))


def test_the_prefect_server_keeps_its_leases_in_files() -> None:
    variables = {item["name"]: item.get("value") for item in container_of("prefect-server")["env"]}
    assert variables["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] == LEASES


def test_the_training_runs_in_the_image_and_its_worker_follows_the_masters_output() -> None:
    for name in ("training Master", "training Worker"):
        container = container_of(name)
        assert container["image"].rpartition("/")[2] == "likeness:0.1.0-cuda"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(TRAINING["spec"]["nprocPerNode"])
        assert "$output" in container["args"][-1]
    assert "-m tasks.training.process.worker" in container_of("training Worker")["args"][-1]
