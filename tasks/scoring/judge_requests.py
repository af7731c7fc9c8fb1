"""All requests to the judges: samples, repeats, controls and pairs, each with a unique name."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from PIL import Image, ImageFilter

from tasks.images import encode_png
from tasks.manifests.evaluation import Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.rubric import Evidence, concept_spec, pair_spec, prompt_spec, quality_spec
from tasks.services.llm.chat.request import RequestSpec

AXES = ("concept_preservation", "prompt_following", "image_quality")
BLUR_SHARE = 1 / 32  # blur radius as a fraction of the longer side
Kind = Literal[
    "sample",
    "positive_control",
    "negative_control",
    "shuffled",
    "blurred",
    "pair",
    "checkpoint_pair",
    "model_pair",
    "tie_break",
]


@dataclass(frozen=True)
class JudgeRequest:
    """One request to the judge, and what it is about."""

    spec: RequestSpec[Any]
    kind: Kind
    axis: str
    key: str
    """The sample's object, or for pairs both, base first."""
    repeat: int = 0
    is_swapped: bool = False
    candidates: tuple[str, str] = ("", "")
    """The two candidates of a pair, in the key's order."""

    @property
    def name(self) -> str:
        """A unique name; answers are keyed by it."""
        return f"{self.kind}/{self.axis}/{self.key}/{self.repeat}{'/swapped' if self.is_swapped else ''}"


@dataclass(frozen=True)
class JudgeContext:
    """Inputs of the judge's requests; images as PNG bytes."""

    class_noun: str
    references: list[bytes]
    samples: list[Sample]
    others: list[Sample]
    """Class samples of the base model: other subjects of the same class."""
    read: Callable[[Sample], bytes]
    candidates: list[Sample] = field(default_factory=list)
    """Samples of the other retained checkpoints."""
    published_step: int = 0
    evidence: Evidence = "before"


def list_judge_requests(config: ScoringConfig, context: JudgeContext) -> list[JudgeRequest]:
    """Return all requests for the first judge, without duplicates; requests with a common prefix are adjacent."""
    requests = [request for sample in context.samples for request in axis_requests(context, sample, repeat=0)]
    for sample in sample_evenly(context.samples, config.num_repeated):
        # Repeat 0 is among the requests above.
        for repeat in range(1, config.num_repeats):
            requests += axis_requests(context, sample, repeat=repeat)
    requests += list(list_controls(config, context))
    requests += list(list_pairs(config, context))
    requests += list(list_checkpoint_pairs(config, context))
    # Samples may be drawn by several lists; a name occurs once.
    return list({request.name: request for request in requests}.values())


def axis_requests(context: JudgeContext, sample: Sample, *, repeat: int) -> list[JudgeRequest]:
    """Return one request per axis for a sample; separate, so that no axis influences another."""
    picture = context.read(sample)
    noun, evidence = context.class_noun, context.evidence
    specs: tuple[RequestSpec[Any], ...] = (
        concept_spec(context.references, picture, class_noun=noun, repeat=repeat, evidence=evidence),
        prompt_spec(picture, class_prompt=sample.class_prompt, repeat=repeat, evidence=evidence),
        quality_spec(picture, repeat=repeat, evidence=evidence),
    )
    return [
        JudgeRequest(spec, "sample", axis, sample.image.key, repeat) for spec, axis in zip(specs, AXES, strict=True)
    ]


def list_controls(config: ScoringConfig, context: JudgeContext) -> Iterator[JudgeRequest]:
    """Yield requests with known outcomes, indistinguishable from others to the judge.

    Positive control: a photo against the other photos. Negative control: another subject of the class. Shuffled: a
    wrong prompt. Blurred: a degraded sample.
    """
    concept, prompt, quality = AXES
    references, noun, evidence = context.references, context.class_noun, context.evidence
    # Leave-one-out, so the graded photo is never among its references.
    for number in range(min(config.num_controls, len(references)) if len(references) > 1 else 0):
        rest = references[:number] + references[number + 1 :]
        spec = concept_spec(rest, references[number], class_noun=noun, repeat=0, evidence=evidence)
        yield JudgeRequest(spec, "positive_control", concept, str(number))
    for other in context.others[: config.num_controls]:
        spec = concept_spec(references, context.read(other), class_noun=noun, repeat=0, evidence=evidence)
        yield JudgeRequest(spec, "negative_control", concept, other.image.key)
    for sample in choose_for_controls(config, context):
        wrong = find_other_prompt(sample, context.samples)
        if wrong:
            spec_prompt = prompt_spec(context.read(sample), class_prompt=wrong, repeat=0, evidence=evidence)
            yield JudgeRequest(spec_prompt, "shuffled", prompt, sample.image.key)
        spec_quality = quality_spec(blur(context.read(sample)), repeat=0, evidence=evidence)
        yield JudgeRequest(spec_quality, "blurred", quality, sample.image.key)


def choose_for_controls(config: ScoringConfig, context: JudgeContext) -> list[Sample]:
    """Return one base sample for each of the `num_controls` longest prompts.

    Of the base model, which follows prompts best: a wrong prompt can lower only a grade that is high.
    """
    by_prompt: dict[str, Sample] = {}
    for sample in context.samples:
        if sample.side == "base":
            by_prompt.setdefault(sample.class_prompt, sample)
    return sorted(by_prompt.values(), key=lambda sample: -len(sample.class_prompt))[: config.num_controls]


def find_other_prompt(sample: Sample, samples: list[Sample]) -> str:
    """Return the longest of the other prompts, which the sample contradicts most; '' where there is none."""
    others = {other.class_prompt for other in samples if other.class_prompt != sample.class_prompt}
    return max(others, key=lambda prompt: (len(prompt), prompt), default="")


def blur(png: bytes) -> bytes:
    """Return a heavily blurred copy as PNG; the radius scales with the image."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    return encode_png(picture.filter(ImageFilter.GaussianBlur(max(2.0, max(picture.size) * BLUR_SHARE))))


def list_pairs(config: ScoringConfig, context: JudgeContext) -> Iterator[JudgeRequest]:
    """Yield base against tuned on the same prompt and seed, each pair in both orders."""
    by_draw = {(sample.prompt, sample.seed, sample.side): sample for sample in context.samples}
    tuned = [sample for sample in context.samples if sample.side == "tuned"]
    for sample in sample_evenly(tuned, config.num_pairs):
        base = by_draw.get((sample.prompt, sample.seed, "base"))
        if base is None:
            continue
        yield from pair_requests(context, "pair", base, other=sample, candidates=("base", "tuned"))


def list_checkpoint_pairs(config: ScoringConfig, context: JudgeContext) -> Iterator[JudgeRequest]:
    """Yield all pairs of retained checkpoints on the same prompt and seed, each in both orders."""
    published = [sample for sample in context.samples if sample.side == "tuned"]
    steps = sorted({sample.step for sample in context.candidates if sample.step is not None})
    by_draw: dict[tuple[str, int], dict[int, Sample]] = {}
    for sample in [*published, *context.candidates]:
        # Samples of the published weights carry no step.
        step = context.published_step if sample.step is None else sample.step
        by_draw.setdefault((sample.prompt, sample.seed), {})[step] = sample
    # Only draws that all steps have: else steps would be compared on different prompts.
    whole = [drawn for drawn in by_draw.values() if steps and len(drawn) == len(steps) + 1]
    for drawn in whole[: config.num_checkpoint_pairs]:
        for first, second in combinations(sorted(drawn), 2):
            candidates = (str(first), str(second))
            yield from pair_requests(
                context, "checkpoint_pair", drawn[first], other=drawn[second], candidates=candidates
            )


def pair_requests(
    context: JudgeContext, kind: Kind, one: Sample, *, other: Sample, candidates: tuple[str, str]
) -> Iterator[JudgeRequest]:
    """Yield a pair in both presentation orders, which cancels position bias."""
    for is_swapped in (False, True):
        first, second = (other, one) if is_swapped else (one, other)
        pictures = context.read(first), context.read(second)
        spec = pair_spec(context.references, *pictures, class_noun=context.class_noun, evidence=context.evidence)
        # The same key in both orders, by which `read_pairs` finds the two answers of a pair.
        key = f"{one.image.key}+{other.image.key}"
        yield JudgeRequest(spec, kind, "pair", key, is_swapped=is_swapped, candidates=candidates)


def list_second_judge_requests(config: ScoringConfig, context: JudgeContext) -> list[JudgeRequest]:
    """Return the second judge's requests: all axes, once, on a fraction of the samples."""
    num = round(config.second_judge_fraction * len(context.samples))
    return [
        request
        for sample in sample_evenly(context.samples, num)
        for request in axis_requests(context, sample, repeat=0)
    ]


def sample_evenly(samples: list[Sample], num: int) -> list[Sample]:
    """Return up to `num` samples at even distances, deterministically."""
    if num >= len(samples):
        return samples
    return [samples[i * len(samples) // num] for i in range(num)]
