"""A local stack: started once, found again, runs submitted to it survive the death of their process, stopped whole."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.cli.stack.processes import has_not_ended, wait_ended
from flows.cli.stack.stack import MLFLOW, PREFECT, REPORTS, WATCHDOG, WORKER, read_state
from flows.cli.stack.submit import make_request
from flows.runs.records import list_run_folders, list_summaries, read_request, read_summary
from tasks.manifests.publishing import REPORT_PATH
from tasks.subject.photos.ingest import DEMO_FOLDER
from tests.stack.commands import LIKENESS, add_remote_judge, environment, likeness
from tests.stack.run_pages import (
    SECONDS,
    click_submit,
    find_artifacts,
    find_field,
    find_requests,
    show_progress,
    show_question,
    wait_for_messages,
    wait_for_state,
)
from tests.stack.screen import check_addresses, find_listeners
from tests.support.browser import keep_screenshot, open_page
from tests.support.llm_server import JudgeRun, scripted_server
from tests.support.prefect_api import create_flow_run, open_api, read_flow_run, read_states, run_deployed, wait_for_type

SETTINGS = ["experiment=smoke", "training.max_train_steps=24", "training.checkpointing_steps=3"]
"""Of all runs, so that they share what the first one computes."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The address of a webhook, and the messages that it received."""
    messages: list[dict[str, str]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server looks for
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", messages
        server.shutdown()


@pytest.fixture
def messages(receiver: tuple[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return receiver[1]


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeRun]:
    """A provider of batch jobs, which the operator's option `llm=remote` names as the judge."""
    with scripted_server(JudgeRun()) as server:
        assert isinstance(server, JudgeRun)
        yield server


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, receiver: tuple[str, list[dict[str, str]]], judge: JudgeRun
) -> Iterator[Path]:
    """A folder with a running stack."""
    folder = tmp_path_factory.mktemp("a stack")
    ports = ("--prefect-port", "0", "--mlflow-port", "0", "--reports-port", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIKENESS_CONF", str(add_remote_judge(folder / "conf", judge.url)))
        done = likeness(folder, "up", *ports, "--notify", receiver[0])
    try:
        assert done.returncode == 0, done.stderr
        yield folder
    finally:
        processes = read_state(folder / "runs").processes
        down = likeness(folder, "down")
        assert down.stdout == "stopped: watchdog, worker, report server, MLflow server, Prefect server\n", down.stderr
        assert not any(process.is_alive() for process in processes)


@pytest.mark.timeout(SECONDS)
def test_a_second_up_finds_the_running_stack(folder: Path) -> None:
    before = read_state(folder / "runs")
    done = likeness(folder, "up")
    assert done.returncode == 0, done.stderr
    assert "found a running stack" in done.stderr
    assert "warning" not in done.stderr
    other = likeness(folder, "up", "--max-runs", "3")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1), other.stderr
    assert "run with --max-runs 2, not --max-runs 3; `likeness down` first" in other.stderr
    assert read_state(folder / "runs") == before
    status = likeness(folder, "status")
    assert status.returncode == 0, status.stdout
    assert status.stdout.count(" running ") == 5


@pytest.mark.timeout(SECONDS)
def test_every_process_listens_on_loopback_alone_and_the_screen_names_each_address(folder: Path) -> None:
    done = likeness(folder, "up")
    assert done.returncode == 0, done.stderr
    named = check_addresses(done.stdout)
    found = {process.name: find_listeners(process.pid) for process in read_state(folder / "runs").processes}
    assert set(found) == {PREFECT, MLFLOW, REPORTS, WORKER, WATCHDOG}
    assert {address for addresses in found.values() for address, _ in addresses} <= {"127.0.0.1", "::1"}
    # What a run starts below the worker, such as the vision server, is not for a person.
    servers = {port for name in (PREFECT, MLFLOW, REPORTS) for _, port in found[name]}
    assert servers == set(named.values())


def find_trainer(pid: int) -> psutil.Process | None:
    """Return the flow run's process below a worker, once training has begun."""
    for flow_run in psutil.Process(pid).children():
        for child in flow_run.children(recursive=True):
            try:
                if "tasks.training.process.worker" in " ".join(child.cmdline()):
                    return flow_run
            except psutil.Error:
                continue
    return None


@pytest.mark.timeout(SECONDS)
def test_a_submitted_run_whose_process_is_killed_is_rescheduled_and_resumes(folder: Path) -> None:
    follower = subprocess.Popen(
        [*LIKENESS, "submit", *SETTINGS], cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    worker = read_state(folder / "runs").find("worker")
    assert worker is not None
    deadline = time.monotonic() + SECONDS
    checkpoints = "runs/work/training/*/checkpoints/step-*"
    while not list(folder.glob(checkpoints)):
        assert time.monotonic() < deadline
        assert follower.poll() is None, follower.stdout and follower.stdout.read()
        time.sleep(0.1)
    flow_run = find_trainer(worker.pid)
    assert flow_run is not None
    flow_run.send_signal(signal.SIGKILL)
    text, _ = follower.communicate(timeout=SECONDS)
    assert follower.returncode == 0, text
    # On a loaded machine a death is reported twice: a third process begins, and leaves the run to the second.
    assert text.count("Beginning flow run") >= 2
    assert "training resumes from its checkpoint at step" in text
    assert re.search(r"training: \d+/24  loss \d", text), text  # progress, logged by the worker
    [finished] = [
        summary for path in folder.glob("runs/*/summary.json")
        if (summary := json.loads(path.read_text()))["status"] == "finished"
    ]  # fmt: skip
    assert finished["stages"]["training"]["counts"]["resumed_from_step"] > 0
    assert finished["stages"]["subject"]["cached"]
    with open_api(folder / "runs") as client:
        keys = {artifact["key"] for artifact in find_artifacts(client, finished["flow_run_id"])}
        assert "progress-training" in keys, keys
        show_progress(str(client.base_url).removesuffix("/api/"), finished["flow_run_id"])


@pytest.mark.timeout(2 * SECONDS)
def test_a_run_cancelled_in_the_ui_saves_training_and_is_resumed_by_its_name_on_the_pool(folder: Path) -> None:
    words = ["experiment=smoke", "training.max_train_steps=40", "training.checkpointing_steps=40", "seed=1"]
    work = folder / "runs" / "work" / "training"
    worker = read_state(folder / "runs").find(WORKER)
    assert worker is not None
    with open_api(folder / "runs") as client:
        run = create_flow_run(client, [*words, f"output_dir={folder / 'runs'}"])
        # The first step is done; the next checkpoint by schedule would be the last step's.
        deadline = time.monotonic() + SECONDS
        while not any(path.stat().st_size for path in work.glob("*/losses.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        flow_process = find_trainer(worker.pid)
        assert flow_process is not None
        family = [flow_process, *flow_process.children(recursive=True)]
        state = {"type": "CANCELLING", "name": "Cancelling"}
        client.post(f"/flow_runs/{run}/set_state", json={"state": state}).raise_for_status()
        wait_for_type(client, run, "CANCELLED", seconds=120)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert [each.status for each in list_summaries(folder / "runs") if each.flow_run_id == run] == ["cancelled"]
    assert any(work.glob("*/checkpoints/step-*"))
    with open_api(folder / "runs") as client:
        # One that were marked as crashed on the way would be scheduled again.
        assert "CRASHED" not in {state["type"] for state in read_states(client, run)}
        name = str(read_flow_run(client, run)["name"])
    assert re.fullmatch(r"fish-full-[0-9a-f]{6}-[0-9a-f]{4}", name)  # of subject, method and configuration
    resumed = likeness(folder, "resume", name)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    finished = list_summaries(folder / "runs")[0]
    assert finished.status == "finished"
    assert finished.flow_run_id != run  # a run of its own: attempts of one are counted
    assert finished.stages["training"].counts["resumed_from_step"] > 0
    again = likeness(folder, "resume", name)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1), again.stderr
    assert f"flow run {name} is Completed" in again.stderr


def reset_interrupts() -> None:
    """Let an interrupt end the process: a shell makes those in its background, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.timeout(SECONDS)
def test_a_follower_detaches_by_an_interrupt_and_the_run_is_cancelled_by_its_name(
    folder: Path, messages: list[dict[str, str]]
) -> None:
    follower = subprocess.Popen(
        [*LIKENESS, "submit", *SETTINGS, "seed=2"], cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=reset_interrupts,  # noqa: PLW1509 - no threads yet
    )  # fmt: skip
    assert follower.stdout is not None
    lines = []
    for line in follower.stdout:
        lines.append(line)
        if line == "-- Running\n":
            break
    assert lines[-1:] == ["-- Running\n"], lines
    follower.send_signal(signal.SIGINT)
    text, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0, text
    name = str(lines[0]).removeprefix("submitted ").partition(":")[0]
    assert f"detached; {name} is still running: `likeness logs {name}`, `likeness cancel {name}`" in text
    cancelled = likeness(folder, "cancel", name)
    assert (cancelled.returncode, cancelled.stdout) == (0, f"{name} is being cancelled; running it again resumes it\n")
    followed = likeness(folder, "logs", name)
    assert followed.returncode == 130, followed.stdout + followed.stderr
    assert "-- Cancelled" in followed.stdout
    again = likeness(folder, "cancel", name)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1), again.stderr
    assert f"{name} has ended: Cancelled" in again.stderr
    wait_for_messages(messages, name, "Cancelled")


@pytest.mark.timeout(SECONDS)
def test_a_run_starts_from_the_form_and_its_page_shows_stages_artifacts_and_the_tracked_run(folder: Path) -> None:
    with open_api(folder / "runs") as client, open_page(1280, 1500) as page:
        prefect = str(client.base_url).removesuffix("/api/")
        known = {each["id"] for each in find_requests(client, class_noun="fish")}
        deployment = client.get("/deployments/name/personalize-subject/personalize-subject").json()
        page.goto(f"{prefect}/deployments/deployment/{deployment['id']}/run")
        find_field(page, "Class Noun").locator("textarea").fill("fish", timeout=60_000)
        # A click alone does not open the list of Prefect's own select.
        find_field(page, "Experiment").locator(".p-select-button__control").press("ArrowDown")
        page.get_by_text("smoke", exact=True).last.click()
        settings = dict(override.split("=") for override in SETTINGS[1:])
        find_field(page, "Settings").locator("textarea").fill(json.dumps({k: int(v) for k, v in settings.items()}))
        keep_screenshot(page, "form")
        click_submit(page)
        deadline = time.monotonic() + 60
        while not (found := [each for each in find_requests(client, class_noun="fish") if each["id"] not in known]):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        [run] = found
        done = wait_for_state(client, run["id"], "Completed")
        assert re.fullmatch(r"fish-full-[0-9a-f]{6}-[0-9a-f]{4}", done["name"])  # not the form's own
        page.goto(f"{prefect}/runs/flow-run/{run['id']}")
        page.get_by_text("Completed", exact=True).first.wait_for(timeout=60_000)
        page.get_by_text("training", exact=False).first.wait_for(timeout=60_000)  # a task of the run's graph or list
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("report-fish").first.wait_for(timeout=60_000)
        keep_screenshot(page, "run")
        [summary] = [s for s in list_summaries(folder / "runs") if s.flow_run_id == run["id"]]
        page.goto(summary.links["mlflow"])
        page.get_by_text("tuned/dino").first.wait_for(timeout=60_000)
        keep_screenshot(page, "mlflow")
        page.goto(f"{prefect}/events?events=prefect.asset.materialization.succeeded")
        page.get_by_text("likeness://03-training/", exact=False).first.wait_for(timeout=60_000)
        keep_screenshot(page, "assets")
        # Where `links["report"]` leads without a report server.
        page.goto(f"{summary.links['mlflow']}/artifacts/{REPORT_PATH}")
        page.frame_locator("iframe").get_by_text("Lineage, time and cost").first.wait_for(timeout=60_000)


def read_table(folder: Path) -> dict[str, dict[str, str]]:
    (path,) = (folder / "runs").glob("many/*/table.csv")
    return {row["name"]: row for row in csv.DictReader(path.read_text().splitlines())}


@pytest.mark.timeout(SECONDS)
def test_many_subjects_run_on_the_pool_each_once(folder: Path) -> None:
    (folder / "subjects.csv").write_text(
        "source,class_noun,name,publishing.title\ndemo,fish,one,One\ndemo,fish,two,Two\nnowhere,fish,none,\n"
    )
    words = ["run-many", "subjects.csv", *SETTINGS]
    done = likeness(folder, *words)
    assert done.returncode == 1, done.stderr
    rows = read_table(folder)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {"one": "finished", "two": "finished", "none": "refused"}, done.stderr
    assert float(rows["one"]["dino"]) > 0
    assert done.stderr.count(": submitted as ") == 2
    with open_api(folder / "runs") as client:
        runs = client.post("/flow_runs/filter", json={}).json()
    # A run with a parent could not be suspended for approval.
    assert {run["parent_task_run_id"] for run in runs if run["name"].startswith(("one-", "two-"))} == {None}
    count = len(list((folder / "runs").glob("*/request.json")))
    again = likeness(folder, *words)
    assert {name: row["status"] for name, row in read_table(folder).items()} == {
        "one": "unchanged", "two": "unchanged", "none": "refused",
    }, again.stderr  # fmt: skip
    assert len(list((folder / "runs").glob("*/request.json"))) == count


@pytest.mark.timeout(SECONDS)
def test_a_new_folder_of_the_inbox_becomes_exactly_one_run(folder: Path) -> None:
    rex = folder / "runs" / "store" / "subjects" / "rex"
    shutil.copytree(DEMO_FOLDER, rex)
    (rex / "subject.yaml").write_text("class_noun: fish\nsettings: {training.max_train_steps: 24}\n")
    base = make_request(SETTINGS, folder / "runs").model_dump(mode="json", exclude_unset=True)
    del base["settings"]["output_dir"]  # as in the schedule: the worker knows its own
    request = {"subjects": "store:subjects/", "wait": False, "settle_seconds": 0, "base": base}
    command = ["deployment", "run", "personalize-many/personalize-many", "--watch", "--param"]
    with ThreadPoolExecutor(2) as pool:  # two that look at once
        looks = [pool.submit(prefect, folder, *command, f"request={json.dumps(request)}") for _ in range(2)]
    for look in looks:
        done = look.result()
        assert done.returncode == 0, done.stdout + done.stderr
    record = next((folder / "runs" / "store" / "subject-runs").glob("*.json"))
    deadline = time.monotonic() + SECONDS
    while not (runs := find_runs(folder, source="store:subjects/rex/")):
        assert time.monotonic() < deadline, record.read_text()
        time.sleep(1)
    while any(read_summary(run).status == "running" for run in runs):
        assert time.monotonic() < deadline
        time.sleep(1)
    run_scheduled(folder, request)
    (run,) = find_runs(folder, source="store:subjects/rex/")
    assert read_summary(run).status == "finished"
    # The photos are those of the demo, wherever they lie: nothing is trained again.
    assert read_summary(run).stages["training"].cached


def run_scheduled(folder: Path, request: dict[str, Any]) -> None:
    """Let the inbox's schedule look once, every few seconds instead of minutes, and pause it again."""
    with open_api(folder / "runs") as client:
        deployment = client.get("/deployments/name/personalize-many/personalize-many").raise_for_status().json()
        [schedule] = deployment["schedules"]
        assert not schedule["active"]
        place = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
        quick = {"active": True, "schedule": {"interval": 10}, "parameters": {"request": request}}
        client.patch(place, json=quick).raise_for_status()
        body = {
            "deployments": {"id": {"any_": [deployment["id"]]}},
            "flow_runs": {"tags": {"all_": ["auto-scheduled"]}, "state": {"type": {"any_": ["COMPLETED", "FAILED"]}}},
        }
        deadline = time.monotonic() + SECONDS
        while not (ended := client.post("/flow_runs/filter", json=body).raise_for_status().json()):
            assert time.monotonic() < deadline
            time.sleep(1)
        client.patch(place, json={"active": False}).raise_for_status()
        assert {run["state_type"] for run in ended} == {"COMPLETED"}


@pytest.mark.timeout(SECONDS)
def test_a_person_decides_while_the_run_is_suspended_and_is_notified(
    folder: Path, messages: list[dict[str, str]]
) -> None:
    done = likeness(folder, "submit", *SETTINGS, "subject.approval=ask", "--detach")
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.strip().rsplit("/", 1)[-1]
    with open_api(folder / "runs") as client:
        run = wait_for_state(client, run_id, "Suspended")
        assert run["state"]["state_details"]["run_input_keyset"]
        refused = client.post(f"/flow_runs/{run_id}/resume", json={"run_input": {"photo_1": "perhaps"}})
        assert refused.status_code == 200
        assert refused.json()["status"] == "REJECT"
        [asked] = [s for s in list_summaries(folder / "runs") if s.flow_run_id == run_id]
        assert asked.status == "pending"
        show_question(str(client.base_url).removesuffix("/api/"), run_id)
        first, second = sorted(path.name for path in DEMO_FOLDER.glob("*.jpg"))[:2]
        (folder / "captions.csv").write_text(f"photo,surroundings,view\n{second},in a red room,\n")
        words = ["approve", asked.run_id, "--reject", first, "--captions", "captions.csv", "--yes"]
        approved = likeness(folder, *words)
        assert approved.returncode == 0, approved.stderr
        wait_for_state(client, run_id, "Completed")
    [summary] = [s for s in list_summaries(folder / "runs") if s.flow_run_id == run_id and s.status == "finished"]
    assert summary.stages["subject"].counts["photos"] == 4
    manifest = json.loads(Path(str(summary.paths and summary.paths.manifests["subject"])).read_text())
    assert "in a red room" in [image["surroundings"] for image in manifest["images"]]
    links = summary.links
    assert links["prefect"].endswith(f"/runs/flow-run/{run_id}")
    report = httpx.get(links["report"], trust_env=False)
    assert report.status_code == 200
    assert links["prefect"] in report.text
    assert links["mlflow"] in report.text
    mlflow, _, tracking_run = links["mlflow"].partition("/#/experiments/1/runs/")
    tracked = httpx.get(f"{mlflow}/api/2.0/mlflow/runs/get", params={"run_id": tracking_run}, trust_env=False).json()
    tags = {tag["key"]: tag["value"] for tag in tracked["run"]["data"]["tags"]}
    assert tags["likeness.link.prefect"] == links["prefect"]
    assert tags["likeness.link.report"] == links["report"]
    wait_for_messages(messages, run["name"], "Suspended", "Completed")


def find_runs(folder: Path, *, source: str) -> list[Path]:
    return [run for run in list_run_folders(folder / "runs") if read_request(run).request.source == source]


def prefect(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    server = read_state(folder / "runs").find(PREFECT)
    assert server is not None
    return subprocess.run(
        [sys.executable, "-m", "prefect", *words], cwd=folder, capture_output=True, text=True, timeout=SECONDS,
        check=False, env={**environment(), "PREFECT_API_URL": f"http://127.0.0.1:{server.port}/api"},
    )  # fmt: skip


@pytest.mark.timeout(SECONDS)
def test_a_run_whose_worker_is_killed_goes_on_in_its_own_process(folder: Path) -> None:
    worker = read_state(folder / "runs").find(WORKER)
    assert worker is not None
    with open_api(folder / "runs") as client:
        run = create_flow_run(client, [*SETTINGS, f"output_dir={folder / 'runs'}"])
        wait_for_type(client, run, "RUNNING", seconds=SECONDS)
        # Before the flow's first line, Prefect's own lines still end the process; the run is then scheduled again.
        deadline = time.monotonic() + SECONDS
        while not any(summary.flow_run_id == run for summary in list_summaries(folder / "runs")):
            assert time.monotonic() < deadline, "the flow never began"
            time.sleep(0.1)
        flow_processes = psutil.Process(worker.pid).children()
        psutil.Process(worker.pid).kill()
        assert any(map(has_not_ended, flow_processes))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LIKENESS_CONF", str(folder / "conf"))
            up = likeness(folder, "up")
        assert up.returncode == 0, up.stderr
        wait_for_type(client, run, "COMPLETED", "FAILED", "CRASHED", "CANCELLED", seconds=SECONDS)
        # Another attempt would be another RUNNING.
        assert [state["type"] for state in read_states(client, run)][-2:] == ["RUNNING", "COMPLETED"]
        assert [state["type"] for state in read_states(client, run)].count("RUNNING") == 1
    wait_ended(flow_processes, seconds=60)
    assert not any(map(has_not_ended, flow_processes))
    assert [summary.status for summary in list_summaries(folder / "runs") if summary.flow_run_id == run] == ["finished"]


def score_pending(client: httpx.Client) -> str:
    """Trigger the deployment as its schedule does, and return what the UI shows of its end."""
    run = run_deployed(client, "score-pending/score-pending")
    return str(wait_for_type(client, run, "COMPLETED", "FAILED", seconds=SECONDS)["state"]["message"])


@pytest.mark.timeout(SECONDS)
def test_a_run_whose_batch_job_is_late_is_finished_by_the_deployed_score_pending(
    folder: Path, judge: JudgeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIKENESS_CONF", str(folder / "conf"))
    words = [*SETTINGS, "llm=remote", "scoring.max_wait_seconds=1", "scoring.poll_seconds=0.2"]
    with open_api(folder / "runs") as client:
        with judge.batch_api.turn:  # the provider is busy
            run = create_flow_run(client, [*words, f"output_dir={folder / 'runs'}"])
            wait_for_type(client, run, "FAILED", "COMPLETED", seconds=SECONDS)
            [pending] = [summary for summary in list_summaries(folder / "runs") if summary.flow_run_id == run]
            assert pending.status == "pending", pending.error
            assert score_pending(client) == "0 finished, 1 still pending, 0 failed"
            statuses = {s.status for s in list_summaries(folder / "runs") if s.config_digest == pending.config_digest}
            assert statuses == {"pending"}
        assert score_pending(client) == "1 finished, 0 still pending, 0 failed"
    after = [s for s in list_summaries(folder / "runs") if s.config_digest == pending.config_digest]
    assert {summary.status for summary in after[1:]} == {"resumed"}
    assert after[0].status == "finished"
    assert after[0].scores["tuned"].concept_preservation == 3
    assert (judge.counts["POST /v1/batches"], judge.counts["POST /v1/chat/completions"]) == (1, 0)
