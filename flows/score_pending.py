"""Go on with runs whose batch jobs were still running: everything before is stored, so only they are asked for."""

import logging
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import deployment

from conf.trust import allowed_roots, check_path
from flows.personalize_subject import personalize_subject
from flows.run_records import list_pending, read_request, read_summary, write_summary
from tasks.errors import LikenessError, StillPending

log = logging.getLogger(__name__)


@flow(name="score-pending", persist_result=False)
def score_pending(output_dir: str = "runs") -> list[dict[str, Any]]:
    """Finish every parked run whose batch job has ended; return the summaries of those that did.

    Safe to run at any time and again: a job that is still running stays parked, and nothing is paid twice.
    """
    if deployment.id is not None:
        check_path("output_dir", output_dir, allowed_roots())
    finished = []
    for folders in list_pending(Path(output_dir)):
        try:
            summary = personalize_subject(read_request(folders[0]).request)
        except StillPending:
            continue
        except LikenessError as error:  # it must not keep the others waiting
            log.warning("run %s could not go on: %s", folders[-1].name, error)
            continue
        for folder in folders:
            write_summary(folder, {**read_summary(folder), "status": "continued", "continued_by": summary["run_id"]})
        finished.append(summary)
    return finished
