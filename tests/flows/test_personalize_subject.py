"""The whole job, for real, on the embedded default."""

import hashlib
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from flows.runs.records import list_summaries
from tasks.images import SOURCE_TYPE, XMP_KEY, decode_png, read_mark
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.publishing import Publication
from tasks.manifests.training import TunedModel
from tasks.services.store.local import LocalStore
from tasks.stage.cache import PREFIXES
from tasks.stage.digests import parse_json, sign, verify_signed
from tests.support.cli_sandbox import CliSandbox


def test_six_stages_turn_photos_into_a_published_model(first_run: dict[str, Any]) -> None:
    assert list(first_run["stages"]) == list(PREFIXES)
    assert not any(stage["cached"] for stage in first_run["stages"].values())
    assert first_run["training_steps"] == 6
    # Two calls a photo and one for all; three a sample, three again for one, four controls, a pair twice.
    assert first_run["llm_calls"] == 2 * 5 + 1 + 3 * 4 + 3 + 4 + 2
    assert first_run["judge"]["is_reliable"] in (True, False)
    assert first_run["cost_usd"] == 0.0
    for side in ("base", "tuned"):
        assert set(first_run["metrics"][side]) == {
            "dino", "clip_i", "clip_t", "pres", "dino_div", "nearest", "copies", "sharpness",
        }  # fmt: skip
        assert set(first_run["scores"][side]) == {"concept_preservation", "prompt_following", "image_quality"}
    model = Path(first_run["paths"]["model"])
    assert {"README.md", "lineage.json", "model_index.json", "unet", "vae", "text_encoder"} <= {
        p.name for p in model.iterdir()
    }
    assert all(Path(path).exists() for path in first_run["paths"]["manifests"].values())


def test_the_report_is_self_contained(first_run: dict[str, Any]) -> None:
    html = Path(first_run["paths"]["report"]).read_text()
    assert len(re.findall("data:image/(png|webp);base64,", html)) >= 5 + 4 + 4 + 4
    assert "http://" not in html
    assert "https://" not in html
    for text in ("DINO", "CLIP-T", "PRES", "sks fish", "loss", "Lineage, time and cost"):
        assert text in html


def test_a_rerun_with_the_embedded_prefect_server_is_fully_cached(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    done = sandbox.embedded().run()
    assert done.returncode == 0, done.stderr[-3000:]
    again = sandbox.newest()
    assert again["run_id"] != first_run["run_id"]
    assert all(stage["cached"] for stage in again["stages"].values())
    assert (again["llm_calls"], again["training_steps"]) == (0, 0)
    assert again["metrics"] == first_run["metrics"]
    assert again["config_digest"] == first_run["config_digest"]


def test_a_changed_setting_recomputes_only_dependent_stages(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    done = sandbox.run("evaluation.seed=5", "publishing=local", "tracking=none")
    assert done.returncode == 0, done.stderr[-3000:]
    # Progress is not logged a second time where a person sees it.
    lines = [line for line in done.stderr.splitlines() if "samples: " in line]
    assert lines and len(set(lines)) == len(lines) and all(line.startswith("samples: ") for line in lines), lines
    cached = {name: stage["cached"] for name, stage in sandbox.newest()["stages"].items()}
    assert cached == {
        "subject": True, "prior": True, "training": True, "evaluation": False, "scoring": False, "publishing": False,
    }  # fmt: skip


def test_generate_samples_images_with_the_tuned_model_and_marks_them(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    folder = sandbox.output / first_run["run_id"]  # as a shell completes it
    words = ["generate", str(folder), "a photo of sks fish at night", "--steps", "2", "--seed", "4"]
    done = sandbox.likeness(*words, "--num", "2", "--grid", "--out", "new folder/one.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "new folder/one-000.png  seed 4", "new folder/one-001.png  seed 5", "new folder/one-grid.png  grid",
    ]  # fmt: skip
    assert "images: 2/2" in done.stderr
    data = (sandbox.folder / "new folder" / "one-000.png").read_bytes()
    assert decode_png(data).size == (64, 64)
    mark = read_mark(data)
    assert mark["Title"] == "a photo of sks fish at night"
    assert SOURCE_TYPE in mark[XMP_KEY]
    assert decode_png((sandbox.folder / "new folder" / "one-grid.png").read_bytes()).size == (128, 64)


def test_runs_and_reports_are_listed(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    listed = json.loads(sandbox.likeness("runs", "--json").stdout)
    assert first_run["run_id"] in [summary["run_id"] for summary in listed]
    assert listed == sorted(listed, key=lambda summary: summary["run_id"], reverse=True)
    assert first_run["run_id"] in sandbox.likeness("runs").stdout
    report = sandbox.likeness("report", first_run["run_id"]).stdout.strip()
    assert (sandbox.folder / report).exists()


def test_tracking_has_losses_metrics_artifacts_and_the_model(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{sandbox.output / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert client.get_model_version_by_alias("likeness-fish", "latest-tuned")
    version = client.get_model_version("likeness-fish", first_run["registered"]["version"])
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.max_train_steps"] == "6"
    assert run.data.metrics["tuned/dino"] == first_run["metrics"]["tuned"]["dino"]
    assert run.data.metrics["llm/calls"] == first_run["llm_calls"]
    assert (run.data.metrics["llm/cost_usd"], run.data.tags["likeness.llm_cost"]) == (0.0, "0.00000 USD")
    assert len(client.get_metric_history(version.run_id, "train/loss")) == 6
    names = {item.path for item in client.list_artifacts(version.run_id)}
    assert names == {"model", "report"}


def test_the_report_of_a_run_names_the_folder_of_its_model(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    folder = sandbox.output.absolute() / first_run["run_id"]
    page = (folder / "report.html").read_text()
    assert f"from_pretrained(&#39;{folder}/model&#39;)" in page
    assert f"likeness generate {first_run['run_id']} " in page
    assert "THIS FOLDER" not in page
    assert "generate latest" not in page.split('<h2 id="use">', 1)[1]
    assert '<a href="model/lineage.json" download>' in page
    assert (folder / "model" / "lineage.json").is_file()


def test_a_model_is_promoted_by_the_gate_or_by_force_and_demoted_once(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    name = first_run["run_id"]
    refused = sandbox.likeness("promote", name)
    assert refused.returncode == 1, refused.stderr
    assert "is not the champion:" in refused.stdout
    assert "too few prompts" in refused.stdout  # two have no interval
    assert "use --force to promote it anyway" in refused.stdout
    forced = sandbox.likeness("promote", name, "--force")
    assert (forced.returncode, "is now the champion (forced)" in forced.stdout) == (0, True), forced.stderr
    demoted = sandbox.likeness("demote", name)
    assert (demoted.returncode, "has no champion" in demoted.stdout) == (0, True), demoted.stderr
    again = sandbox.likeness("demote", name)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1), again.stderr
    assert "is not the champion; no version is" in again.stderr


OPEN_GATE = [
    "publishing.gate.min_dino_gain=-2", "publishing.gate.max_clip_t_loss=1", "publishing.gate.max_pres_gain=2",
    "publishing.gate.max_copies=1", "publishing.gate.needs_reliable_judge=false",
]  # fmt: skip
"""Limits that a model of six steps passes."""


def test_a_run_becomes_the_champion_at_its_end_where_it_passes_the_gate(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{sandbox.output / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name = "likeness-gated"  # of its own: other tests count on there being no champion
    words = (
        f"tracking.registered_model={name}",
        "evaluation.prompts=set:thorough",
        "evaluation.num_images_per_prompt=1",
    )
    done = sandbox.run(*words, *OPEN_GATE)
    assert done.returncode == 0, done.stderr[-3000:]
    own = sandbox.newest()
    assert own["stages"]["training"]["key"] == first_run["stages"]["training"]["key"]
    assert own["stages"]["training"]["cached"]
    assert own["registered"] == {"model": name, "version": "1", "is_champion": True, "blockers": []}
    assert f"registry  {name} version 1, the champion" in done.stdout
    champion = client.get_model_version_by_alias(name, "champion")
    assert str(champion.version) == "1"
    assert champion.tags["likeness.evaluation"] == own["stages"]["evaluation"]["key"]
    assert champion.tags["likeness.prompt_set"] == "living/thorough, version 1"

    # The same samples behind a gate that they don't pass: registered, and the alias stays.
    done = sandbox.run(*words, *OPEN_GATE[1:], "publishing.gate.min_dino_gain=2")
    assert done.returncode == 0, done.stderr[-3000:]
    registered = sandbox.newest()["registered"]
    assert (registered["version"], registered["is_champion"]) == ("2", False)
    assert "required > +2.000" in registered["blockers"][0]
    assert "not the champion: lower bound of the DINO gain" in done.stdout
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"


def test_publishing_reruns_if_the_model_version_is_gone_from_the_registry(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{sandbox.output / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    registered = sandbox.run()
    assert registered.returncode == 0, registered.stderr[-3000:]
    version = sandbox.newest()["registered"]["version"]
    client.delete_model_version("likeness-fish", version)
    done = sandbox.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"version {version} of the registered model likeness-fish is gone" in done.stderr
    again = sandbox.newest()
    assert {name for name, stage in again["stages"].items() if not stage["cached"]} == {"publishing"}
    assert again["registered"]["version"] != version
    assert client.get_model_version("likeness-fish", again["registered"]["version"])


def test_a_run_that_cannot_publish_is_failed_in_its_summary_its_exit_code_and_prefect(
    first_run: dict[str, Any], sandbox: CliSandbox, free_port: int
) -> None:
    def list_publications() -> set[str]:
        found = sandbox.output.glob(f"store/{PREFIXES['publishing']}/*/manifest.json")
        return {path.parent.name for path in found}

    before, published = {summary.run_id for summary in list_summaries(sandbox.output)}, list_publications()
    done = sandbox.run(f"tracking.uri=http://127.0.0.1:{free_port}", "tracking.max_wait_seconds=0")
    assert done.returncode == 4, done.stderr
    assert f"ServiceUnavailable: tracking at http://127.0.0.1:{free_port} does not answer" in done.stderr
    [failed] = [each for each in list_summaries(sandbox.output) if each.run_id not in before]
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.kind == "ServiceUnavailable"
    assert failed.registered is None
    assert sandbox.newest()["run_id"] == failed.run_id
    with urllib.request.urlopen(f"{sandbox.server_url}/flow_runs/{failed.flow_run_id}", timeout=60) as answer:
        assert json.load(answer)["state_type"] == "FAILED"
    # Nothing of it counts as published: with a server, the same settings publish.
    assert list_publications() == published


def test_a_recomputed_stage_with_another_result_invalidates_downstream_stages(
    first_run: dict[str, Any], sandbox: CliSandbox
) -> None:
    """Samples, scores and the published model describe the weights that there are, not those that there were."""
    path = Path(first_run["paths"]["manifests"]["training"])
    manifest = verify_signed(parse_json(path.read_bytes()))
    weights = next(
        ref for ref in manifest["objects"] if ref["key"].endswith("unet/diffusion_pytorch_model.safetensors")
    )
    kept = {name: (sandbox.output / "store" / name).read_bytes() for name in (weights["key"],)}
    changed = load(kept[weights["key"]])
    # Far enough from what was trained to change each picture: a small step may vanish in 8 bits, by the CPU's rounding.
    data = save({name: tensor * 1.5 for name, tensor in changed.items()})
    new = {**weights, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    whole = json.loads(json.dumps(manifest).replace(json.dumps(weights), json.dumps(new)))
    before = path.read_bytes()
    try:
        LocalStore(sandbox.output / "store").put_bytes(weights["key"], data)
        path.write_text(json.dumps(sign(whole)))
        done = sandbox.run()
        assert done.returncode == 0, done.stderr[-3000:]
        cached = {stage: told["cached"] for stage, told in sandbox.newest()["stages"].items()}
    finally:
        LocalStore(sandbox.output / "store").put_bytes(weights["key"], kept[weights["key"]])
        path.write_bytes(before)
    assert cached == {
        "subject": True, "prior": True, "training": True, "evaluation": False, "scoring": False, "publishing": False,
    }  # fmt: skip


def test_a_damaged_object_is_recomputed(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    manifest = json.loads(Path(first_run["paths"]["manifests"]["evaluation"]).read_text())
    key = manifest["samples"][0]["image"]["key"]
    (sandbox.output / "store" / key).write_bytes(b"flipped")
    done = sandbox.run()
    assert done.returncode == 0, done.stderr[-3000:]
    again = sandbox.newest()
    assert again["stages"]["training"]["cached"]
    assert not again["stages"]["evaluation"]["cached"]
    assert again["metrics"] == first_run["metrics"]


PICK_LAST = (
    "publishing.pick=last", "publishing=local", "tracking=none", "training.validation.keep=best",
    "training.validation.save_top_k=2", "training.validation.validation_steps=2", "training.validation.num_holdout=1",
    "training.learning_rate=1e-3",  # so high that the loss of the held-out photo rises
)  # fmt: skip


def test_the_picked_checkpoint_is_measured_judged_and_published(sandbox: CliSandbox) -> None:
    done = sandbox.run(*PICK_LAST)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = sandbox.newest()["paths"]["manifests"]
    read = {name: verify_signed(parse_json(Path(path).read_bytes())) for name, path in paths.items()}
    tuned, evaluation, publication = (
        kind.model_validate(read[kind_name])
        for kind_name, kind in (("training", TunedModel), ("evaluation", Evaluation), ("publishing", Publication))
    )
    [last] = tuned.find_candidates()
    assert tuned.published_step < last, "training publishes the best step"
    assert (publication.published_step, evaluation.published_step) == (last, last)
    assert publication.published_because == f"the latest of the retained steps {tuned.published_step}, {last}"
    weights = {ref.sha256 for ref in tuned.find_candidates()[last] if "/unet/" in ref.key}
    assert weights <= {ref.sha256 for ref in publication.model}
    assert weights.isdisjoint({ref.sha256 for ref in tuned.model if ref.key.endswith(".safetensors")})
    judged = {judgement["sample"]["key"] for judgement in read["scoring"]["judgements"]}
    assert judged == {sample.image.key for sample in evaluation.samples if sample.kind == "subject"}
