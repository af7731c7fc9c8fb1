"""Go on with runs whose batch jobs were still running: everything before is stored, so only they are asked for."""

import json
import logging
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import deployment

from conf.request import RunRequest
from conf.trust import allowed_roots, check_path
from flows.personalize_subject import personalize_subject
from flows.runs import list_pending, write_json
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
        request = RunRequest.model_validate_json((folders[0] / "request.json").read_text())
        try:
            summary = personalize_subject(request)
        except StillPending:
            continue
        except LikenessError as error:  # it must not keep the others waiting
            log.warning("run %s could not go on: %s", folders[-1].name, error)
            continue
        for folder in folders:
            note = json.loads((folder / "summary.json").read_text())
            write_json(folder / "summary.json", {**note, "status": "continued", "continued_by": summary["run_id"]})
        finished.append(summary)
    return finished
