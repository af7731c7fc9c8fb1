"""Sweeps over a cheap function in place of whole runs."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from conf.compose import compile_request
from conf.request import RunRequest, Value
from conf.schema import RunConfig
from conf.sweep import SweepRequest, read_sweep
from flows.sweep_settings import run_sweep
from flows.sweeps.outcome import SweepOutcome
from tasks.manifests.run_summary import RegisteredModel, RunSummary, StageSummary
from tasks.manifests.scoring import SideScores

RATE, STEPS = "training.learning_rate", "training.max_train_steps"
Formula = Callable[[Mapping[str, Value], int], float]
"""From a run's settings and its seed to its DINO."""


@dataclass
class FakeRuns:
    """Stands in for the main job: DINO is a formula of the settings, every run costs 0.25 USD."""

    formula: Formula = lambda values, seed: float(str(values.get(RATE, 0.0)))
    requests: list[RunRequest] = field(default_factory=list)

    def __call__(self, request: RunRequest) -> RunSummary:
        self.requests.append(request)
        seed = request.seed if request.seed is not None else int(str(request.settings.get("seed", 0)))
        dino = self.formula(request.settings, seed)
        number = len(self.requests)
        is_registered = bool(request.settings.get("publishing.is_registered"))
        return RunSummary(
            run_id=f"run-{number}",
            status="finished",
            wall_seconds=10.0 * number,
            cost_usd=0.25,
            stages={
                "prior": StageSummary(key="p", cached=number > 1),
                "training": StageSummary(key="t", counts={"steps": 6}, seconds=1.0 * number),
            },
            metrics={"tuned": {"dino": dino, "clip_i": 0.5, "clip_t": 0.5, "div": None}},
            scores={"tuned": SideScores(concept_preservation=dino, prompt_following=4 - dino, image_quality=3)},
            registered=RegisteredModel(model="likeness-fish", version="3") if is_registered else None,
        )

    def settings(self, *names: str) -> list[tuple[Value, ...]]:
        """Return the values of some settings in every run."""
        return [tuple(request.settings.get(name) for name in names) for request in self.requests]


def sweep_request(output: Path, *words: str, **options: object) -> SweepRequest:
    """Return a sweep in a folder, without tracking."""
    return read_sweep([f"output_dir={output}", "tracking=none", *words], options)


def sweep(request: SweepRequest, run: Callable[[RunRequest], RunSummary]) -> SweepOutcome:
    """Run a sweep over a cheap function."""
    return run_sweep(request, compile_base(request.base.model_dump_json()), run)


@cache
def compile_base(request: str) -> RunConfig:
    """Return the configuration of a request; composing takes a third of a second."""
    return compile_request(RunRequest.model_validate_json(request))


def interrupt_after(number: int, run: Callable[[RunRequest], RunSummary]) -> Callable[[RunRequest], RunSummary]:
    """Return a function that is interrupted, as by Ctrl-C, at its call `number`, counted from 1."""
    calls = itertools.count(1)

    def interrupted(request: RunRequest) -> RunSummary:
        if next(calls) == number:
            raise KeyboardInterrupt
        return run(request)

    return interrupted
