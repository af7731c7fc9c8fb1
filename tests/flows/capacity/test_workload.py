"""What a run took, from its records: its GPUs, and runs that show only a part."""

from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.request import RunRequest, Value
from flows.capacity.workload import STAGES, Installation, measure_run
from flows.cli.spending.capacity import list_notes
from flows.runs.records import PastRun
from tasks.errors import ConfigError
from tasks.manifests.run_summary import RunSummary, StageSummary
from tasks.services.llm.budget.ledger import Ledger, LedgerRow

OFFER = Installation(
    gpus=4, gpu_speedup=1, gpu_usd_per_hour=36, workers=1000, llm_requests_per_minute=1e6, batch_hours=0,
    batch_requests_queued=10**6, server_requests_per_run=1, server_requests_per_second=1e6, database_rows_per_run=10,
    store_requests_per_second=1e6,
)  # fmt: skip


def make_run(folder: Path, *, counts: dict[str, int] | None = None, **settings: Value) -> PastRun:
    """Return a finished run whose stages took 10 s each."""
    named: dict[str, Value] = {name.replace("__", "."): value for name, value in settings.items()}
    config = compile_request(RunRequest(store="local", settings={"output_dir": str(folder), **named}))
    training = {"steps": 40, "resumed_from_step": 0, **(counts or {})}
    sampling = {name: training[name] for name in ("devices", "shared") if name in training}
    by_stage = {"training": training, "evaluation": sampling}
    stages = {name: StageSummary(key="k", seconds=10, counts=by_stage.get(name, {})) for name in STAGES}
    return PastRun(config=config, summary=RunSummary(run_id="a-run", status="finished", stages=stages))


@pytest.mark.parametrize(
    ("counts", "settings", "gpus"),
    [
        ({}, {}, 1),
        # All GPUs of the machine: the configuration says 0.
        ({"world_size": 8}, {"training__num_devices": 0}, 8),
        ({"world_size": 4}, {"training__num_devices": 2, "training__num_nodes": 2,
                             "training__rdzv_endpoint": "gpu-1:29500"}, 4),
        # Of the stages that sample, as they counted.
        ({"devices": 3}, {"evaluation__num_devices": 0}, 3),
    ],
)  # fmt: skip
def test_a_workload_holds_the_gpus_of_its_largest_stage(
    tmp_path: Path, counts: dict[str, int], settings: dict[str, Value], gpus: int
) -> None:
    work = measure_run(make_run(tmp_path, counts=counts, **settings), tmp_path)
    assert (work.gpus, work.on_gpu) == (gpus, 30)
    measured = list_notes(work, OFFER, tmp_path)[0]
    assert (f"30 s on {gpus} GPUs" in measured) == (gpus > 1)


def test_a_run_that_took_samples_of_others_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, counts={"shared": 20})
    with pytest.raises(ConfigError, match=r"took 20 samples of the base model from earlier runs; name a run of"):
        measure_run(run, tmp_path)


def test_a_run_that_resumed_its_training_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, counts={"resumed_from_step": 36})
    with pytest.raises(
        ConfigError, match=r"resumed its training at step 36[^\n]*; name a run that was not interrupted"
    ):
        measure_run(run, tmp_path)


def test_cached_replies_are_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "from the cache" not in " ".join(list_notes(measure_run(run, tmp_path), OFFER, tmp_path))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for outcome in ("cached", "ok", "cached", "invalid"):
        ledger.record(LedgerRow(role="judge", profile="p", requested_model="m", outcome=outcome))
    work = measure_run(run, tmp_path)
    assert work.cached_replies == 2
    assert any(
        note.startswith("2 LLM replies of this run came from the cache") for note in list_notes(work, OFFER, tmp_path)
    )
