"""Measure the LLM layer and print it as Markdown: money, requests under faults, the judge's reliability.

python -m tests.bench.llm [--subjects 4]

The judge is the mini vision server, on images of subjects outside its training data: for each, scenes of the
very subject stand for a tuned model and scenes of others of its class for the base model.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.spending.estimate import plan_requests
from tasks.encoders.config import EncoderConfig
from tasks.encoders.embeddings import Encoders
from tasks.errors import LikenessError
from tasks.images import decode_png, encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Sample, Side
from tasks.mini.vision_server.launch import LocalServer
from tasks.mini.world.scenes import CLASS_NOUNS, PLACE_PHRASES, draw_scene, sample_subject_scene
from tasks.scoring import scores
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import JudgeContext, list_judge_requests
from tasks.scoring.scores import Judged
from tasks.scoring.statistics import compute_spearman
from tasks.services.llm.budget.cost_estimate import estimate_calls
from tasks.services.llm.budget.ledger import Ledger
from tasks.services.llm.config import CapabilityConfig, ProfileConfig
from tasks.services.llm.executor import AskOptions, ask_each
from tasks.services.llm.service import LlmService, LocalServices
from tasks.services.store.local import LocalStore
from tests.support.config import make_config, make_llm_config
from tests.support.llm import CHAT, GOOD, SPEC
from tests.support.llm_server import completion, scripted_server

PROFILES = ("openai-luna", "openai-luna-5", "openai-nano", "xai", "xai-fast", "openrouter")
GROUPS = {"openai": "openai", "xai": "xai", "openrouter": "openrouter"}
NUM_SAMPLES = 8


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.llm", description=__doc__)
    parser.add_argument("--subjects", type=int, default=4, help="subjects that are judged (default: 4)")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("openai", "torch"))
    print(f"{os.cpu_count()} CPU cores, {platform.machine()}; {versions}; {time.strftime('%Y-%m-%d')}\n")
    print_money()
    print_faults()
    print_judge(options.subjects)


def print_money() -> None:
    """Print what a subject of 5 photos with 96 judged samples would cost at published prices."""
    print("| profile | calls | tokens in | USD, replies of 120 tokens | USD, at most |\n|---|---|---|---|---|")
    for name in PROFILES:
        group = GROUPS[name.split("-")[0]]
        words = [f"llm={group}", f"llm.models={name}", "scoring=sync"]
        words += ["diffusion.resolution=512", "evaluation.num_images_per_prompt=8"]
        config = compile_request(parse_overrides(words))
        is_batch = config.llm.profiles[name].capabilities.batch != "none"
        rows = [
            estimate_calls(config.llm, replace(planned, is_batch=is_batch and planned.role == "judge"))
            for planned in plan_requests(config)
            if not planned.is_follow_up
        ]
        low, high = sum(row.expected_usd or 0 for row in rows), sum(row.worst_usd or 0 for row in rows)
        calls, tokens = sum(row.calls for row in rows), sum(row.input_tokens for row in rows)
        way = ", judge by batch" if is_batch else ""
        print(f"| `{name}`{way} | {calls} | {tokens:,} | {low:.3f} | {high:.3f} |")


FAULTS: dict[str, list[Any]] = {
    "none": [GOOD],
    "429, Retry-After 0.2 s, then well": [(429, {"retry-after": "0.2"}, b"{}"), GOOD],
    "429, Retry-After 600 s": [(429, {"retry-after": "600"}, b"{}")],
    "429, quota used up": [(429, {}, b'{"error": {"message": "insufficient_quota"}}')],
    "401": [(401, {}, b"{}")],
    "500 for ever": [(500, {"retry-after": "0"}, b"{}")],
    "a reply that doesn't fit, then one that does": ['{"grade": 9}', GOOD],
    "replies that never fit": ['{"grade": 9}'],
    "a reply that is cut off": [(200, {}, json.dumps(completion('{"grade": 2', finish_reason="length")).encode())],
}


def print_faults() -> None:
    """Print how many requests each fault costs, with four attempts allowed, and what comes of it."""
    print("\n| fault | requests | outcome |\n|---|---|---|")
    for fault, script in FAULTS.items():
        with scripted_server() as server, tempfile.TemporaryDirectory() as name:
            server.script(*script)
            capabilities = CapabilityConfig(response_format="json_schema")
            profile = ProfileConfig(base_url=server.url, model="asked-model", capabilities=capabilities)
            llm = make_service(profile, Path(name))
            try:
                llm.ask(SPEC, role="judge")
                outcome = "answered"
            except LikenessError as error:
                outcome = f"`{type(error).__name__}`"
            print(f"| {fault} | {server.counts[CHAT]} | {outcome} |")


def make_service(profile: ProfileConfig, folder: Path, **options: Any) -> LlmService:
    """Return a service of one profile."""
    config = make_llm_config(models=("p",), profiles={"p": profile})
    return LlmService(config, store=LocalStore(folder / "store"), ledger=Ledger(folder / "ledger.jsonl"), **options)


def print_judge(num_subjects: int) -> None:
    """Print controls, agreement and rank correlation of the mini judge on subjects outside its training data."""
    print("\n| subject | itself | another | wrong prompt | blurred | alpha | pairs | grades: other, same |")
    print("|---|---|---|---|---|---|---|---|")
    grades: list[float] = []
    similarities: list[float] = []
    encoders = Encoders(make_config(EncoderConfig, clip="mini", dino="mini", dino_resize=None), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = LocalServer(folder / "log")
        profile = ProfileConfig(model="mini-vision", capabilities=CapabilityConfig(response_format="json_schema"))
        llm = make_service(profile, folder, local=LocalServices(start_server=server.start))
        try:
            for noun in CLASS_NOUNS[:num_subjects]:
                material = draw_material(noun)
                print(judge(llm, noun, material, encoders, grades, similarities))
        finally:
            llm.close()
            server.stop()
    print(f"\nSpearman between grades of likeness and DINO similarity, {len(grades)} samples: "
          f"{compute_spearman(grades, similarities):.2f}")  # fmt: skip


def draw_material(noun: str) -> JudgeContext:
    """Draw references and samples: the same subject for `tuned`, others of its class for `base`."""
    pictures: dict[str, Image.Image] = {}

    def add(side: Side, kind: Any, index: int, seed: int) -> Sample:
        scene = sample_subject_scene(noun, seed=seed, index=index)
        key = f"{side}/{kind}/{index}"
        pictures[key] = draw_scene(scene, size=64)
        prompt = f"a photo of a {noun} {PLACE_PHRASES[scene.place][0]}"
        ref = ObjectRef(key=key, sha256="", size_bytes=0)
        return Sample(image=ref, side=side, kind=kind, prompt=f"p{index}", class_prompt=prompt, seed=index)

    own = 900 + CLASS_NOUNS.index(noun)
    tuned = [add("tuned", "subject", index, own) for index in range(3, 3 + NUM_SAMPLES)]
    base = [add("base", "subject", index, own + 40 + index) for index in range(3, 3 + NUM_SAMPLES)]
    others = [add("base", "class", index, own + 80 + index) for index in range(3)]
    references = [draw_scene(sample_subject_scene(noun, seed=own, index=index), size=128) for index in range(3)]
    return JudgeContext(
        class_noun=noun,
        references=[encode_png(picture) for picture in references],
        samples=[*base, *tuned],
        others=others,
        read=lambda sample: encode_png(pictures[sample.image.key]),
    )


def judge(
    llm: LlmService,
    noun: str,
    material: JudgeContext,
    encoders: Encoders,
    grades: list[float],
    similarities: list[float],
) -> str:
    """Ask everything about one subject and return its row; add its samples' grades and similarities."""
    questions = list_judge_requests(make_config(ScoringConfig), material)
    specs = {question.name: question.spec for question in questions}
    answers, _ = ask_each(llm, specs, AskOptions("judge"))
    judgements = scores.to_judgements(material.samples, Judged(questions, answers))
    reliability = scores.assess_judge(material.samples, Judged(questions, answers), is_comparable=True)
    photos = encoders.encode_dino([decode_png(png) for png in material.references])
    drawn = encoders.encode_dino([decode_png(material.read(sample)) for sample in material.samples])
    grades += [judgement.concept_preservation for judgement in judgements]
    similarities += (drawn @ photos.T).mean(1).tolist()
    controls = [f"{c.value:.1f}{'' if c.is_passed else ' (failed)'}" for c in reliability.controls]
    alpha = reliability.alpha["concept_preservation"]
    pairs = scores.count_pairs(Judged(questions, answers))
    assert pairs is not None
    means = scores.average(judgements)
    return (
        f"| {noun} | {' | '.join(controls)} | {'-' if alpha is None else f'{alpha:.2f}'} | "
        f"{pairs.tuned_wins} of {pairs.num_pairs}, {pairs.inconsistent} inconsistent | "
        f"{means['base'].concept_preservation:.2f}, {means['tuned'].concept_preservation:.2f} |"
    )


if __name__ == "__main__":
    main()
