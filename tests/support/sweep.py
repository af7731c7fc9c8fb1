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
from flows.runs.context import make_run_folder, progress_of_run
from flows.runs.records import write_end, write_stages
from flows.sweep_settings import run_sweep
from flows.sweeps.outcome import SweepOutcome
from tasks.manifests.run_summary import RegisteredModel, RunSummary, StageSummary
from tasks.manifests.scoring import SideScores
from tasks.stage.digests import dump_line

RATE, STEPS = "training.learning_rate", "training.max_train_steps"
VALIDATED = "training.validation.validation_steps=2"
VALIDATION_STEPS = (2, 4, 6)
Formula = Callable[[Mapping[str, Value], int], float]
"""From a run's settings and its seed to its DINO."""


@dataclass
class FakeRuns:
    """Stands in for the main job: DINO is a formula of the settings, every run costs 0.25 USD.

    All but the first find class images, and the latents of nine images.
    """

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
                "training": StageSummary(
                    key="t",
                    counts={"steps": 6, **({"cached_latents": 9} if number > 1 else {})},
                    seconds=1.0 * number,
                ),
            },
            metrics={"tuned": {"dino": dino, "clip_i": 0.5, "clip_t": 0.5, "div": None}},
            scores={"tuned": SideScores(concept_preservation=dino, prompt_following=4 - dino, image_quality=3)},
            registered=RegisteredModel(model="likeness-fish", version="3") if is_registered else None,
        )

    def settings(self, *names: str) -> list[tuple[Value, ...]]:
        """Return the values of some settings in every run."""
        return [tuple(request.settings.get(name) for name in names) for request in self.requests]


def begin_training(config: RunConfig, request: RunRequest, *, key: str) -> Path:
    """Return the event file of a run that is training."""
    output = Path(config.output_dir)
    folder = make_run_folder(output, config, request, is_trusted=True)
    write_stages(folder, {"training": key})
    events = output / "work" / "training" / key / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text(dump_line({"event": "started", "step": 0}))
    return events


class Trainings(FakeRuns):
    """Runs whose training validates: the loss is the learning rate."""

    def __call__(self, request: RunRequest) -> RunSummary:
        config = compile_request(request)
        events = begin_training(config, request, key=f"key{len(self.requests)}")
        summary = super().__call__(request)
        view = progress_of_run.get()
        folder = sorted(Path(config.output_dir).glob("*/request.json"))[-1].parent
        try:
            for step in VALIDATION_STEPS:
                rate = float(str(request.settings[RATE]))
                with events.open("a") as file:
                    file.write(dump_line({"event": "step", "step": step, "validation_loss": rate}))
                if view is not None:  # as the supervisor of the training does
                    view.update("training", step, VALIDATION_STEPS[-1])
        except BaseException as error:
            write_end(folder, folder.name, error)
            raise
        write_end(folder, folder.name, RuntimeError("ended"))
        return summary


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
