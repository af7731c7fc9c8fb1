"""The model card, and the snippets that users copy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.manifests.base import ModelRef
from tasks.manifests.run import RunManifests
from tasks.publishing.export import export_model
from tasks.publishing.model_card import write_front_matter
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.report import make_run, make_table

HOSTILE = 'it\'s "a": {b}\n--- # & *x'


def change(run: RunManifests, *, location: str, method: str = "lora") -> RunManifests:
    base = ModelRef(location=location, revision=None, sha256="b")
    training = run.training.model_copy(update={"base_model": base, "method": method})
    return RunManifests(run.subject, run.prior, training, run.evaluation, run.scoring)


def read_front_matter(run: RunManifests, title: str = "One fish") -> dict[str, Any]:
    text = write_front_matter(run, title=title, instance_prompt="a photo of sks fish")
    assert text.startswith("---\n")
    assert text.endswith("\n---\n")
    fields: dict[str, Any] = yaml.safe_load(text.removeprefix("---\n").removesuffix("---\n"))
    return fields


def test_the_hub_reads_the_front_matter(store: LocalStore, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = change(make_run(store), location="stabilityai/stable-diffusion-xl-base-1.0")
    export_model(StageFolder(store, "publishing", "k"), run, title="One fish", local=tmp_path)
    data = ModelCard((tmp_path / "README.md").read_text()).data
    assert data.base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (data.license, data.pipeline_tag, data.library_name) == ("openrail++", "text-to-image", "diffusers")
    assert data.to_dict()["instance_prompt"].startswith("a photo of sks ")
    assert {"text-to-image", "dreambooth", "lora"} <= set(data.tags)
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "dino": 0.5, "clip_i": 0.7, "clip_t": 0.3,
    }  # fmt: skip
    assert data.eval_results[0].dataset_name == "2 evaluation prompts"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("mini", {"license": "apache-2.0"}),
        ("some/model", {"license": "other", "base_model": "some/model"}),
        ("/a/local/folder", {"license": "other"}),
        (
            "black-forest-labs/FLUX.1-dev",
            {
                "license": "other",
                "license_name": "flux-1-dev-non-commercial-license",
                "base_model": "black-forest-labs/FLUX.1-dev",
                "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
            },
        ),
    ],
)
def test_the_license_is_the_base_models_where_it_is_known(
    store: LocalStore, location: str, expected: dict[str, str]
) -> None:
    fields = read_front_matter(change(make_run(store), location=location))
    assert {name: fields[name] for name in fields if name.startswith(("license", "base_model"))} == expected


def test_a_title_cannot_break_the_front_matter(store: LocalStore) -> None:
    fields = read_front_matter(make_run(store), title=HOSTILE)
    assert fields["model-index"][0]["name"] == HOSTILE


def test_the_table_of_a_model_card_has_intervals(store: LocalStore, tmp_path: Path) -> None:
    run = make_run(store)
    estimates = {"dino": make_table(has_interval=True)["dino"]}
    run = replace(run, evaluation=run.evaluation.model_copy(update={"estimates": estimates}))
    export_model(StageFolder(store, "publishing", "k"), run, title="One fish", local=tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| DINO | 0.200 [0.150, 0.250] | 0.500 [0.450, 0.550] | 0.800 |" in card
    assert "| CLIP-T | 0.400 | 0.300 | 0.500 |" in card
