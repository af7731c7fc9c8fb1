"""Search settings of the main job with Optuna, or repeat one with several seeds; trials share cached stages.

A study is stored in `<output_dir>/sweeps/<study>.journal`, so an interrupted sweep resumes; its report lies in
`<output_dir>/sweeps/<study>/report.html`.
"""

from collections.abc import Callable
from pathlib import Path

from prefect import flow
from prefect.runtime import deployment

from conf.compose import compile_request
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.sweep import SweepRequest, check_sweep
from conf.trust import allowed_roots
from flows.personalize_subject import personalize_subject
from flows.runs.attempts import end_when_cancelled
from flows.sweeps.outcome import SweepOutcome, collect_outcome, describe_trial
from flows.sweeps.plots import draw_plots
from flows.sweeps.pool import SWEEP_FLOW, choose_runner
from flows.sweeps.report import write_report
from flows.sweeps.runners import LocalRunner
from flows.sweeps.study import SweepStudy
from flows.sweeps.tracking import needs_tracking, open_tracking
from flows.sweeps.trials import REGISTERED, SEED_VALUES, Trials, make_runs
from tasks.errors import ConfigError
from tasks.manifests.run_summary import RegisteredModel, RunSummary
from tasks.mini.vision_server.launch import keep_server
from tasks.training.process.fork_server import keep_imports


@flow(name=SWEEP_FLOW, persist_result=False)
@end_when_cancelled
def sweep_settings(request: SweepRequest) -> SweepOutcome:
    """Run the study's remaining trials and return all results with the best one."""
    if deployment.id is None:
        config = compile_request(request.base)  # its values were checked where it was typed
    else:
        config = check_sweep(request, roots=allowed_roots())
    if config.subject.approval == "ask":
        raise ConfigError("a sweep asks nobody: approve the photos in one run, then leave out subject.approval=ask")
    return run_sweep(request, config, personalize_subject)


def run_sweep(request: SweepRequest, config: RunConfig, run: Callable[[RunRequest], RunSummary]) -> SweepOutcome:
    """Run the trials that are left, with `run` for each run of one, and write the report.

    Raises:
        ConfigError: no trial is complete.

    """
    folder = Path(config.output_dir) / "sweeps"
    study = SweepStudy(request, folder, seed=config.seed)
    runner = choose_runner(request.num_parallel, LocalRunner(run), is_deployed=deployment.id is not None)
    trials = Trials(study, runner, config, on_complete=lambda trial, summaries: None)
    is_ended = bool(trials.find_limit())
    tracking = open_tracking(study, config, is_ended=is_ended) if not is_ended or needs_tracking(study) else None
    if tracking is not None:
        trials.on_complete = tracking.track
    report = folder / request.study_name / "report.html"
    ended_by, is_failed = "", True
    try:
        with keep_server(folder / request.study_name / "vision-server.log"), keep_imports():
            ended_by = trials.run()
        is_failed = False
    finally:
        # Also where it was interrupted: what is known so far.
        outcome = collect_outcome(study, trials.ended, ended_by=ended_by, report=report)
        if tracking is not None:
            tracking.finish(is_failed=is_failed)
        write_report(outcome, request, draw_plots(study) if request.is_search else [])
    if not outcome.best:
        reasons = "; ".join(dict.fromkeys(trial.error for trial in outcome.trials if trial.error))
        raise ConfigError(f"no trial of {request.study_name} finished: {reasons or 'see the runs'}")
    if request.publish_best:
        outcome = outcome.model_copy(update={"published": publish_best(study, config, run)})
    return outcome


def publish_best(
    study: SweepStudy, config: RunConfig, run: Callable[[RunRequest], RunSummary]
) -> RegisteredModel | None:
    """Register the model of the best trial, of its best seed: all stages but publishing are cached."""
    best = study.best()[0]
    sign = -1 if study.objectives[0].is_minimized else 1
    table = best.user_attrs[SEED_VALUES]
    index = max(range(len(table)), key=lambda seed: sign * table[seed][0])
    request = make_runs(study, config, describe_trial(best).settings)[index]
    return run(request.model_copy(update={"settings": {**request.settings, REGISTERED: True}})).registered
