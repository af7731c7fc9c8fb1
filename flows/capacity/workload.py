"""What one run takes, as measured by a finished one, and what an installation offers."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.compose import describe_invalid
from conf.groups import CONFIG_DIR
from flows.runs.records import PastRun
from tasks.errors import ConfigError
from tasks.services.llm.budget.ledger import read_rows
from tasks.services.store.open import open_store
from tasks.stage.cache import PREFIXES

DEFAULTS = CONFIG_DIR / "capacity.yaml"
GPU_STAGES = ("prior", "training", "evaluation")
"""Stages that hold a GPU."""
STAGES = ("subject", *GPU_STAGES, "scoring", "publishing")


class Installation(BaseModel):
    """What runs share, and its limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = Field(ge=1, le=100_000)
    gpu_speedup: float = Field(gt=0, le=10_000)
    gpu_usd_per_hour: float = Field(ge=0, le=10_000)
    workers: int = Field(ge=1, le=1_000_000)
    llm_requests_per_minute: float = Field(gt=0, le=10_000_000)
    batch_hours: float = Field(ge=0, le=1_000)
    batch_requests_queued: int = Field(ge=1, le=1_000_000_000)
    server_requests_per_run: float = Field(gt=0, le=1_000_000)
    server_requests_per_second: float = Field(gt=0, le=1_000_000)
    database_rows_per_run: int = Field(ge=1, le=1_000_000)
    store_requests_per_second: float = Field(gt=0, le=10_000_000)


@dataclass(frozen=True)
class Workload:
    """What one run takes, on the machine it was measured on."""

    name: str
    before_gpu: float
    """Seconds of a worker before a GPU is needed: photos, their inspection, and start-up."""
    on_gpu: float
    """Seconds during which its GPUs are held."""
    after_gpu: float
    """Seconds of a worker after the GPU is free, without the wait for a batch job."""
    llm_calls: int
    """Sent one by one."""
    batch_requests: int
    """Sent by batch job; 0: the run waits for none."""
    llm_usd: float
    objects: int
    stored_bytes: int
    gpus: int = 1
    """Held at a time: what the stage with the most devices takes."""
    cached_replies: int = 0
    """LLM replies from the cache, which were neither requested nor paid."""


def read_installation(words: list[str]) -> Installation:
    """Return the shipped assumptions with NAME=VALUE applied. Raises ConfigError for an unknown or impossible one."""
    plain: dict[str, object] = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or name not in plain:
            raise ConfigError(f"{word[:80]!r} is no assumption; they are {', '.join(plain)}")
        plain[name] = value
    try:
        return Installation.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error


def measure_run(run: PastRun, folder: Path) -> Workload:
    """Return what a finished run took.

    Raises:
        ConfigError: it took stages from the store or resumed its training, so that it shows a part of what they take.

    """
    stages = run.summary.stages
    cached = [name for name in STAGES if name not in stages or stages[name].cached]
    if cached:
        raise ConfigError(
            f"{folder.name} did not compute {', '.join(cached)}; name a run that computed every stage (`likeness runs`)"
        )
    training = stages["training"].counts
    if training.get("resumed_from_step", 0):
        raise ConfigError(
            f"{folder.name} resumed its training at step {training['resumed_from_step']}, and recorded the seconds "
            "of the last attempt alone; name a run that was not interrupted (`likeness runs`)"
        )
    shared = stages["evaluation"].counts.get("shared", 0)
    if shared:
        raise ConfigError(
            f"{folder.name} took {shared} samples of the base model from earlier runs; name a run of an empty store"
        )
    store = open_store(run.config.store)
    stored = [each for name in STAGES for each in store.list_objects(f"{PREFIXES[name]}/{stages[name].key}/")]
    is_batch = run.config.scoring.executor == "batch"
    calls = {name: stages[name].counts.get("llm_calls", 0) for name in ("subject", "scoring")}
    overhead = run.summary.overhead_seconds or 0.0
    return Workload(
        name=folder.name,
        before_gpu=stages["subject"].seconds + overhead / 2,
        on_gpu=sum(stages[name].seconds for name in GPU_STAGES),
        after_gpu=stages["publishing"].seconds + overhead / 2 + (0 if is_batch else stages["scoring"].seconds),
        llm_calls=calls["subject"] + (0 if is_batch else calls["scoring"]),
        batch_requests=calls["scoring"] if is_batch else 0,
        llm_usd=run.summary.cost_usd or 0.0,
        objects=len(stored),
        stored_bytes=sum(each.size_bytes for each in stored),
        gpus=max(count_devices(run), *(stages[name].counts.get("devices", 1) for name in ("prior", "evaluation"))),
        cached_replies=count_cached(folder / "ledger.jsonl"),
    )


def count_devices(run: PastRun) -> int:
    """Return the devices of a training: as counted, since a configuration of 0 means all of the machine's."""
    config = run.config.training
    return run.summary.stages["training"].counts.get("world_size", max(1, config.num_devices) * config.num_nodes)


def count_cached(ledger: Path) -> int:
    """Return the replies that a run took from the cache."""
    return sum(row is not None and row.outcome == "cached" for row in read_rows(ledger)) if ledger.is_file() else 0
