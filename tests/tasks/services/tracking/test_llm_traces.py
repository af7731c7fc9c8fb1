"""LLM calls as traces of a real MLflow: measured, and nothing of what was said."""

import base64
from pathlib import Path

import pytest

from tasks.images import encode_png
from tasks.publishing.registry import TrackedRun, list_llm_calls, track_run
from tasks.services.config import TrackingConfig
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tests.support.config import make_config
from tests.support.llm import Reply, make_llm
from tests.support.llm_server import scripted_server
from tests.support.tiny import draw_photo

KEY, PROMPT, REASON = "sk-canary-0123456789abcdef", "canary of the prompt", "canary of the reply"


def test_llm_calls_are_traced_without_text_images_or_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")  # restored, since the exporter sets it
    picture = encode_png(draw_photo(size=64))
    config = make_config(TrackingConfig, llm_traces=True)
    with scripted_server() as server:
        server.script(f"not JSON, {REASON}", '{"grade": 2}')
        llm = make_llm(
            server, tmp_path, api_key_variable="CANARY_KEY", prices={"input": 1.0, "output": 1.0, "date": "d"}
        )
        spec = RequestSpec(PROMPT, ("grade this", picture), Reply)
        for _ in range(2):
            llm.ask(spec, role="judge")
    ledger = tmp_path / "ledger.jsonl"
    assert list_llm_calls(make_config(TrackingConfig), ledger) == []
    output = tmp_path / "output"
    (output / "published" / "report").mkdir(parents=True)
    tracker = MlflowTracker(config, folder=output)
    run = TrackedRun(
        name="run", params={}, publication_key="k", tags={}, losses=[], figures={}, folder=output / "published",
        registered_model=None, llm_calls=list_llm_calls(config, ledger),
    )  # fmt: skip
    run_id, _ = track_run(tracker, run)
    traces = tracker.client.search_traces(locations=[tracker.find_experiment()], run_id=run_id)
    roots = sorted((trace.data.spans[0] for trace in traces), key=lambda span: span.start_time_ns)
    assert [(root.attributes["outcome"], root.attributes["is_cached"]) for root in roots] == [
        ("invalid", False), ("ok", False), ("cached", True),
    ]  # fmt: skip
    answered = roots[1]
    assert answered.name == "judge"
    assert answered.attributes["response_format"] == "json_schema"
    assert answered.attributes["served_model"] == "asked-model-2026-11-01"
    assert answered.attributes["requested_model"] == "asked-model"
    assert answered.attributes["cost_usd"] > 0
    assert answered.attributes["mlflow.chat.tokenUsage"]["input_tokens"] == 100
    assert answered.end_time_ns > answered.start_time_ns
    assert roots[0].status.status_code.value == "ERROR"
    run_id, _ = track_run(tracker, run)  # as a repeated publication does
    traces = tracker.client.search_traces(locations=[tracker.find_experiment()])
    assert [trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces] == [run_id] * 3
    assert not (tmp_path / "elsewhere.db").exists()
    canaries = [KEY, PROMPT, REASON, "grade this", base64.b64encode(picture).decode()[:60]]
    stored = [path for path in output.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in stored)
    leaks = [(path.name, word) for path in stored for word in canaries if word.encode() in path.read_bytes()]
    assert leaks == []
