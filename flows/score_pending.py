"""Resume runs whose batch jobs were still running: earlier stages are cached, so only the jobs are read."""

import logging
import os
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import deployment
from prefect.states import Completed, Failed

from conf.compose import OUTPUT_VARIABLE
from conf.request import EvaluationRequest
from conf.trust import allowed_roots, check_path
from flows.evaluate_model import evaluate_model
from flows.personalize_subject import personalize_subject
from flows.runs.attempts import end_when_cancelled
from flows.runs.context import trust_of_run
from flows.runs.pending import PendingReport, list_pending
from flows.runs.records import read_request, read_summary, relocate, write_summary
from tasks.errors import LikenessError, StillPending

log = logging.getLogger(__name__)


@flow(name="score-pending", persist_result=False)
@end_when_cancelled
def score_pending(output_dir: str = "") -> PendingReport | State[PendingReport]:
    """Resume every pending run whose batch job has ended, and report the state of each.

    Safe to run at any time and again: a job that is still running stays pending, and nothing is paid twice. In a
    deployment the run fails where one of them could not be resumed.
    """
    output_dir = output_dir or os.environ.get(OUTPUT_VARIABLE) or "runs"
    if deployment.id is not None:
        # A deployment's parameter is as untrusted as the settings of a request.
        check_path("output_dir", output_dir, allowed_roots())
    report = PendingReport()
    for folders in list_pending(Path(output_dir)):
        name = folders[-1].name
        try:
            stored = read_request(folders[0])  # equal for all runs of a group, see list_pending
            token = trust_of_run.set(stored.is_trusted)
            try:
                request = relocate(stored.request, folders[0])
                if stored.model:
                    summary = evaluate_model(EvaluationRequest(model=stored.model, base=request))
                else:
                    summary = personalize_subject(request)
            finally:
                trust_of_run.reset(token)
        except StillPending as error:
            log.info("run %s still waits: %s", name, error)
            report.waiting.append(name)
            continue
        except LikenessError as error:  # it must not keep the others waiting
            log.warning("run %s could not be resumed: %s", name, error)
            report.failed.append(f"{name}: {error.kind}: {error}")
            continue
        for folder in folders:
            changes = {"status": "resumed", "resumed_by": summary.run_id}
            write_summary(folder, read_summary(folder).model_copy(update=changes))
        report.finished.append(summary)
    return report if deployment.id is None else show_state(report)


def show_state(report: PendingReport) -> State[PendingReport]:
    """Return the flow run's state: its message is all that the UI shows of the outcome."""
    if report.failed:
        return Failed(message=f"{report.describe()}: {'; '.join(report.failed)}")
    return Completed(message=report.describe(), data=report)
