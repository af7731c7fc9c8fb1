"""How often a run may be started: crashed runs are rescheduled by an automation, which counts nothing itself."""

from prefect.runtime import flow_run

from tasks.errors import LikenessError

MAX_ATTEMPTS = 5


def check_attempts() -> None:
    """Raise LikenessError where this run was started too often: what kills its process would kill it again."""
    # A failed run is not rescheduled, unlike a crashed one.
    count = flow_run.run_count or 0
    if count > MAX_ATTEMPTS:
        raise LikenessError(
            f"the run crashed {MAX_ATTEMPTS} times; look at its logs, then `likeness resume` it by hand"
        )
