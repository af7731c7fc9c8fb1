"""A run that crashes again and again is not rescheduled for ever."""

import pytest

from flows.runs.attempts import MAX_ATTEMPTS, check_attempts
from tasks.errors import LikenessError


def test_a_run_that_crashed_too_often_fails_instead_of_being_rescheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT"  # Prefect's own way to set what `prefect.runtime` returns
    monkeypatch.setenv(variable, str(MAX_ATTEMPTS))
    check_attempts()
    monkeypatch.setenv(variable, str(MAX_ATTEMPTS + 1))
    with pytest.raises(LikenessError, match="the run crashed 5 times"):
        check_attempts()
