"""The simulation of many runs, against what can be computed by hand."""

from dataclasses import replace

import pytest

from flows.capacity.simulation import ADVICE, LATENCY, Simulation
from flows.capacity.workload import Installation, Workload, read_installation
from tasks.errors import ConfigError

WORK = Workload(
    "run", before_gpu=10, on_gpu=100, after_gpu=5, llm_calls=0, batch_requests=0, llm_usd=0.5, objects=7,
    stored_bytes=1000,
)  # fmt: skip
AMPLE = Installation(
    gpus=4, gpu_speedup=1, gpu_usd_per_hour=36, workers=1000, llm_requests_per_minute=1e6, batch_hours=0,
    batch_requests_queued=10**6, server_requests_per_run=1, server_requests_per_second=1e6, database_rows_per_run=10,
    store_requests_per_second=1e6,
)  # fmt: skip


def test_one_run_takes_its_own_time() -> None:
    found = Simulation(WORK, AMPLE).run(1)
    assert found.seconds == pytest.approx(115, abs=0.01)
    assert found.bottleneck == LATENCY
    assert found.gpu_hours == pytest.approx(100 / 3600)
    assert found.usd == pytest.approx(36 * 100 / 3600 + 0.5)
    assert (found.rows, found.objects, found.stored_bytes) == (10, 7, 1000)


@pytest.mark.parametrize(
    ("work", "changes", "seconds", "bottleneck"),
    [
        # 400 runs of 100 s on 4 GPUs, after the first photos and before the last publishing.
        (WORK, {}, 400 / 4 * 100 + 15, "GPUs"),
        # 2 workers of 115 s.
        (WORK, {"workers": 2}, 400 / 2 * 115, "workers"),
        # 400 x 30 calls at 60 a minute, then the last run.
        (replace(WORK, llm_calls=30), {"gpus": 400, "llm_requests_per_minute": 60}, 400 * 30 + 105, "LLM requests"),
        # Jobs of 50 requests, 2 at a time, an hour each.
        (replace(WORK, batch_requests=50), {"gpus": 400, "batch_hours": 1, "batch_requests_queued": 100},
         110 + 200 * 3600 + 5, "batch queue"),
        (WORK, {"gpus": 400, "server_requests_per_run": 60, "server_requests_per_second": 1}, 400 * 60 + 105,
         "Prefect server"),
        (WORK, {"gpus": 400, "store_requests_per_second": 0.1}, 110 + 400 * 70, "store requests"),
    ],
)  # fmt: skip
def test_the_scarcest_resource_decides_and_is_named(
    work: Workload, changes: dict[str, float], seconds: float, bottleneck: str
) -> None:
    found = Simulation(work, AMPLE.model_copy(update=changes)).run(400)
    assert found.bottleneck == bottleneck
    assert found.seconds == pytest.approx(seconds, rel=0.01)
    assert found.use[bottleneck] == pytest.approx(1, abs=0.02)
    assert bottleneck in ADVICE


def test_a_run_that_waits_for_its_batch_job_holds_no_worker() -> None:
    work = replace(WORK, batch_requests=1)
    found = Simulation(work, AMPLE.model_copy(update={"workers": 4, "batch_hours": 10.0})).run(40)
    # Four at a time until all jobs are sent, then one wait.
    assert found.seconds == pytest.approx(40 / 4 * 110 + 36_000 + 5, rel=0.01)


def test_runs_that_were_begun_are_finished_before_new_ones_start() -> None:
    work = replace(WORK, batch_requests=1)
    simulation = Simulation(work, AMPLE.model_copy(update={"workers": 1, "gpus": 1, "batch_hours": 0.05}))
    found = simulation.run(10)
    assert found.seconds == pytest.approx(10 * 115 + 180 - 5, rel=0.02)


def test_a_hundred_thousand_subjects_are_simulated() -> None:
    found = Simulation(WORK, AMPLE).run(100_000)
    assert found.seconds == pytest.approx(100_000 / 4 * 100, rel=0.01)
    assert found.rows == 1_000_000


def test_faster_gpus_shorten_training_alone() -> None:
    assert Simulation(WORK, AMPLE.model_copy(update={"gpu_speedup": 10.0})).run(1).seconds == pytest.approx(
        25, abs=0.01
    )


def test_assumptions_are_changed_by_name_and_checked() -> None:
    assert read_installation(["gpus=32"]).gpus == 32
    for word, reason in (
        ("gpu=3", "is no assumption"),
        ("gpus=0", "gpus"),
        ("gpus=many", "gpus"),
        ("gpus", "assumption"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_installation([word])


def test_a_run_on_several_gpus_holds_and_bills_all_of_them() -> None:
    work = replace(WORK, gpus=2)
    found = Simulation(work, AMPLE).run(400)
    # Two at a time on four GPUs.
    assert found.seconds == pytest.approx(400 / 2 * 100 + 15, rel=0.01)
    assert found.use["GPUs"] == pytest.approx(1, abs=0.02)
    assert found.gpu_hours == pytest.approx(400 * 2 * 100 / 3600)
    assert found.usd == pytest.approx(36 * found.gpu_hours + 400 * 0.5)
    # Three leave one idle.
    assert Simulation(replace(WORK, gpus=3), AMPLE).run(400).seconds == pytest.approx(400 * 100 + 15, rel=0.01)


def test_a_run_on_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^run holds 5 GPUs at a time, and gpus=4; set gpus=5 or more[^\n]*$"):
        Simulation(replace(WORK, gpus=5), AMPLE)
