"""The model card, and the snippets that users copy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.manifests.base import Machine, ModelRef
from tasks.manifests.prior import ClassImage
from tasks.manifests.run import RunManifests
from tasks.publishing.export import export_model
from tasks.publishing.model_card import CardInputs, write_card, write_front_matter
from tasks.publishing.report.verdict import reach_verdict
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.report import GATE, make_run, make_table

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
    export_model(StageFolder(store, "publishing", "k"), run, card=CardInputs("One fish", GATE), local=tmp_path)
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
    export_model(StageFolder(store, "publishing", "k"), run, card=CardInputs("One fish", GATE), local=tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| DINO | 0.200 [0.150, 0.250] | 0.500 [0.450, 0.550] | 0.800 |" in card
    assert "| CLIP-T | 0.400 | 0.300 | 0.500 |" in card


SETTINGS = {
    "training.learning_rate": "2e-06",
    "training.lora.learning_rate": "0.0001",
    "training.lora.rank": "16",
    "training.textual_inversion.num_vectors": "3",
    "training.train_batch_size": "4",
    "training.prior_loss_weight": "0.75",
    "training.ema_decay": "0.0",
    "training.snr_gamma": "null",
    "training.output_dir": "/home/ann",
    "diffusion.resolution": "512",
    "seed": "23",
}


def read_section(run: RunManifests, title: str, settings: dict[str, str] = SETTINGS) -> list[str]:
    """Return the lines of a section of the model card."""
    text = write_card(run, CardInputs("One fish", GATE, settings))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# One fish", "## Recipe", "## Limits", "## Responsible use",
    ]  # fmt: skip
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].strip().splitlines()


@pytest.mark.parametrize(
    ("method", "shown", "missing"),
    [
        ("full", ["learning rate | 2e-06"], ["LoRA", "token"]),
        ("lora", ["learning rate of the LoRA | 0.0001", "LoRA rank | 16"], ["learning rate | 2e-06", "token"]),
        ("textual_inversion", ["vectors of the token | 3"], ["LoRA", "2e-06"]),
        ("textual_inversion+lora", ["vectors of the token | 3", "LoRA rank | 16"], ["2e-06"]),
    ],
)
def test_the_recipe_has_the_settings_of_its_method(
    store: LocalStore, method: str, shown: list[str], missing: list[str]
) -> None:
    run = change(make_run(store), location="mini", method=method)
    machine = Machine(system="Linux", device="NVIDIA H200", num_devices=2)
    run = replace(
        run, training=run.training.model_copy(update={"machine": machine}), published_because="the knee of A and B"
    )
    recipe = read_section(run, "Recipe")
    always = (
        f"method | {method}", "steps | 3", "published | step 3, the knee of A and B",
        "batch size per device, in photos | 4", "resolution in px | 512", "seed | 23",
        "trained on | 2 x NVIDIA H200", "prior preservation | none",
    )  # fmt: skip
    for row in (*shown, *always):
        assert f"| {row} |" in recipe
    assert not [row for name in (*missing, "EMA", "gamma", "ann") for row in recipe if name in row]


def test_a_value_cannot_break_the_recipe_and_a_frozen_text_encoder_has_no_rate(store: LocalStore) -> None:
    run = change(make_run(store), location="/data/my|models/\n## x\x1b[31m", method="full")
    frozen = {**SETTINGS, "training.train_text_encoder": "false", "training.text_encoder_learning_rate": "2e-05"}
    recipe = read_section(run, "Recipe", frozen)
    [row] = [row for row in recipe if row.startswith("| base model")]
    assert row.startswith("| base model | /data/my\\|models/ ## x\\[31m (")
    assert not [row for row in recipe if "2e-05" in row]
    assert [
        row for row in read_section(run, "Recipe", {**frozen, "training.train_text_encoder": "true"}) if "2e-05" in row
    ]


def test_prior_preservation_has_its_class_images_and_weight(store: LocalStore) -> None:
    run = make_run(store)
    assert run.prior is not None
    image = ClassImage(image=run.subject.images[0].image, seed=1)
    run = replace(run, prior=run.prior.model_copy(update={"images": (image,) * 7}))
    assert "| prior preservation | 7 class images, loss weight 0.75 |" in read_section(run, "Recipe")
    off = {**SETTINGS, "training.prior_loss_weight": "0.0"}
    assert "| prior preservation | none |" in read_section(run, "Recipe", off)


def test_limits_are_the_findings_that_are_not_good_and_what_always_holds(store: LocalStore) -> None:
    run = change(make_run(store), location="mini")
    subject = run.subject.model_copy(update={"warnings": ("the web calls <b>it</b>\n## a [boat](x)",)})
    estimates = {"dino": make_table(has_interval=True)["dino"]}
    run = replace(run, subject=subject, evaluation=run.evaluation.model_copy(update={"estimates": estimates}))
    limits = read_section(run, "Limits")
    verdict = reach_verdict(run, GATE)
    assert limits[0] == f"- Verdict of the evaluation: {verdict.headline}."
    assert "- No sample was graded by the judge." in limits
    assert "- 1 photo was accepted; 3 to 5 are usual." in limits
    assert "- The web calls &lt;b&gt;it&lt;/b&gt; ## a \\[boat\\](x)." in limits
    assert not [row for row in limits if "resemble the subject more" in row], "a good finding is no limit"
    assert "- Number of samples behind the figures: 2, of prompts: 2; other prompts may do worse." in limits
    assert [row for row in limits if "its photo does not show" in row] and [
        row for row in limits if "drawn world" in row
    ]
    assert not [row for row in read_section(change(run, location="some/model"), "Limits") if "drawn world" in row]


def test_responsible_use_names_consent_labels_and_the_license(store: LocalStore) -> None:
    run = change(make_run(store), location="black-forest-labs/FLUX.1-dev")
    text = " ".join(read_section(run, "Responsible use"))
    for words in ("owner of the photos", "without their consent", "Label generated images", "PNG text"):
        assert words in text
    assert "weights too: flux-1-dev-non-commercial-license." in text
    unknown = read_section(change(run, location="some/model"), "Responsible use")[-1]
    assert unknown.endswith("weights too: not known.")
