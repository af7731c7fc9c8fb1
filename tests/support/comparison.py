"""Runs that were evaluated, without the models: their folders, manifests and samples."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from flows.runs.records import write_request, write_summary
from tasks.images import encode_png
from tasks.manifests.evaluation import CeilingMetrics, DriftMetrics, Evaluation, Sample, SubjectMetrics
from tasks.manifests.run_summary import JudgeSummary, RunSummary, StageSummary, Status
from tasks.manifests.subject import ImageMeasures, InstanceImage, SubjectSet
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder

PROMPTS = 8
NOISE = np.random.default_rng(3).normal(0, 0.1, (PROMPTS, 2))
"""Of prompts and seeds, the same for every model: what pairing removes."""


Draw = Callable[[str, int, int], Image.Image]
"""From a run, a prompt and the number of a seed to a sample."""


def draw_plain(name: str, prompt: int, number: int) -> Image.Image:
    """Return a sample of one color, another for each run, prompt and seed."""
    return Image.new("RGB", (16, 16), (sum(map(ord, name)) % 256, 20 * prompt, 90 * number))


def make_run(
    output: Path, name: str, *words: str, shift: float = 0.0, status: Status = "finished", first_seed: int = 1000,
    photo: bytes = b"photo", template: str = "{subject} ", draw: Draw = draw_plain, is_judged: bool = False,
) -> Path:  # fmt: skip
    """Write a run's folder and manifests, its DINO above 0.5 by `shift` and some noise of prompts and seeds.

    Without a `template` it is a run of an earlier version, which noted none.
    """
    store, folder = LocalStore(output / "store"), output / name
    config = compile_request(parse_overrides([f"output_dir={output}", *words]))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    write_request(folder, RunRequest(), is_trusted=True)
    evaluation, subject = (StageFolder(store, stage, name) for stage in ("evaluation", "subject"))
    samples, values = [], {}
    own = np.random.default_rng(sum(map(ord, name))).normal(0, 0.005, NOISE.shape)
    for prompt in range(PROMPTS):
        for number in range(2):
            ref = evaluation.put(f"tuned/{prompt}-{number}.png", encode_png(draw(name, prompt, number)))
            samples.append(
                Sample(image=ref, side="tuned", kind="subject", prompt=f"sks fish <{prompt}>", class_prompt="",
                       seed=first_seed + number,
                       template=f"{template}{prompt}" if template else "", prompt_kind="scene")
            )  # fmt: skip
            dino = 0.5 + float(NOISE[prompt, number] + own[prompt, number]) + shift
            clip_t = 0.3 + float(NOISE[prompt, number] - own[prompt, number])
            values[ref.key] = SubjectMetrics(dino=dino, clip_i=0.5, clip_t=clip_t, redness=dino / 2)
    mean = float(np.mean([value.dino for value in values.values()]))
    evaluation.finish(
        Evaluation(
            **evaluation.head(4, counts={}), samples=tuple(samples),
            metrics={"tuned": SubjectMetrics(dino=mean, clip_i=0.5, clip_t=0.3)},
            drift={"tuned": DriftMetrics(pres=0, dino_div=0)}, ceiling=CeilingMetrics(dino=1, clip_i=1, clip_t=1),
            sample_metrics=values, published_step=1,
        )
    )  # fmt: skip
    image = subject.put("images/a.png", photo)
    measures = ImageMeasures(width=1, height=1, sharpness=0, brightness=0, contrast=0, perceptual_hash="")
    subject.finish(
        SubjectSet(
            **subject.head(6, counts={}), class_noun="fish", identifier_token="sks", rejected=(),
            images=(InstanceImage(image=image, source_name="a", source_sha256=image.sha256, measures=measures,
                                  inspection={}, caption="", surroundings="", view="", instance_prompt=""),),
        )
    )  # fmt: skip
    judge = JudgeSummary(is_reliable=False, reason="failed controls: blur", alpha={}, spearman={}, pairs=None)
    stages = {stage: StageSummary(key=name) for stage in ("evaluation", "subject", *["scoring"] * is_judged)}
    write_summary(folder, RunSummary(run_id=name, status=status, stages=stages, judge=judge))
    return folder
