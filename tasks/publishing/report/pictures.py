"""The pictures of a report, encoded once and counted, so that the page stays below 15 MB."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from tasks.images import XMP, decode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Side
from tasks.manifests.run import RunManifests
from tasks.manifests.subject import InstanceImage
from tasks.publishing.report.tables import SamplePair, list_samples
from tasks.services.store.base import Store
from tasks.stage.cache import read_verified

SIDES, SMALL_SIDE = (512, 384, 256, 192), 128
"""Pictures are shown at the first side in px at which all fit; those of 128 px at most keep their pixels."""
STEPS = (*((side, 48) for side in SIDES), (SIDES[-1], 24), (SIDES[-1], 12))
"""Sides, and how many are shown of each kind beside samples: photos, rejected ones, class samples per side, class
images, grids of training."""
MAX_CHARACTERS = 12_000_000
"""Of all pictures as base64, and of the text beside samples; the rest of the page is far below 3 MB."""
MAX_SHARE = 0.5
"""Of all that pictures beside samples may take: samples are the evidence."""
MARKUP, METRIC_MARKUP = 2_500, 80
"""Characters of a sample's markup, without its prompt and evidence, and of each metric beside DINO and CLIP."""
T = TypeVar("T")


@dataclass(frozen=True)
class Others:
    """The pictures beside samples, evenly thinned."""

    photos: list[InstanceImage]
    rejects: list[ObjectRef]
    class_samples: dict[str, list[ObjectRef]]
    class_images: list[ObjectRef]
    training_grids: list[ObjectRef]

    def refs(self) -> list[ObjectRef]:
        """Return all of them."""
        drawn = (
            *self.class_images,
            *self.training_grids,
            *(ref for refs in self.class_samples.values() for ref in refs),
        )
        return [*(photo.image for photo in self.photos), *self.rejects, *drawn]


@dataclass(frozen=True)
class Gallery:
    """What is shown: data URLs by object key, and the samples that fit."""

    urls: dict[str, str]
    samples: list[SamplePair]
    others: Others
    num_samples: int
    num_grids: int
    num_class_samples: int


def make_gallery(store: Store, run: RunManifests, *, budget: int = MAX_CHARACTERS) -> Gallery:
    """Return the pictures at the largest side at which all fit; at the lowest, as many samples as fit."""
    graded = {judgement.sample.key: judgement for judgement in run.scoring.judgements}
    pairs = list_samples(run.evaluation, graded)
    whole = choose_others(run, most=None)
    real = {image.image.key for image in whole.photos} | {ref.key for ref in whole.rejects}
    for side, most in STEPS:
        others = choose_others(run, most=most)
        refs = others.refs()
        urls = {ref.key: to_data_url(store, ref, max_side=side, is_generated=ref.key not in real) for ref in refs}
        left = budget - sum(len(urls[ref.key]) for ref in refs)
        is_last = side == SIDES[-1]
        if left < budget * (1 - MAX_SHARE) and (side, most) != STEPS[-1]:
            continue
        if encode_pairs(store, pairs, urls, side=side, left=None if is_last else left):
            break
    pairs_shown = choose_pairs(pairs, lambda pair: count_characters(pair, urls), left=left)
    used = {ref.key for ref in refs} | {ref.key for pair in pairs_shown for ref in list_refs(pair)}
    return Gallery(
        {key: url for key, url in urls.items() if key in used}, pairs_shown, others,
        len(pairs), len(whole.training_grids), max(map(len, whole.class_samples.values())),
    )  # fmt: skip


def choose_others(run: RunManifests, *, most: int | None) -> Others:
    """Return at most so many pictures of each kind, evenly spaced; None: all."""
    sides: tuple[Side, ...] = ("base", "tuned")
    drawn = [sample for sample in run.evaluation.samples if sample.kind == "class"]
    rejects = [each.thumbnail for each in (*run.subject.quarantined, *run.subject.rejected) if each.thumbnail]
    return Others(
        photos=thin(run.subject.images, most),
        rejects=rejects[:most],
        class_samples={side: thin([each.image for each in drawn if each.side == side], most) for side in sides},
        class_images=[image.image for image in run.prior.images[:most]] if run.prior else [],
        training_grids=thin([ref for ref in run.training.objects if "/samples/" in ref.key], most),
    )


def encode_pairs(
    store: Store, pairs: Sequence[SamplePair], urls: dict[str, str], *, side: int, left: int | None
) -> bool:
    """Encode the samples of pairs into `urls`; return whether they fit what is left, where that is a limit."""
    sum_ = 0
    for pair in pairs:
        for ref in list_refs(pair):
            if ref.key not in urls:
                urls[ref.key] = to_data_url(store, ref, max_side=side, is_generated=True)
        sum_ += count_characters(pair, urls)
        if left is not None and sum_ > left:  # the next side begins at once: encoding takes most of the time
            return False
    return True


def list_refs(pair: SamplePair) -> Iterator[ObjectRef]:
    """Yield the images of a pair."""
    yield from (sample.image for sample in (pair.base, pair.tuned) if sample is not None)


def count_characters(pair: SamplePair, urls: dict[str, str]) -> int:
    """Return about how many characters a pair takes in the page; a prompt is repeated in labels."""
    text = 6 * len(pair.shown.prompt) + sum(len(grade.evidence) for grade in pair.grades.values())
    return MARKUP + METRIC_MARKUP * len(pair.others) + text + sum(len(urls[ref.key]) for ref in list_refs(pair))


def choose_pairs(pairs: Sequence[SamplePair], measure: Callable[[SamplePair], int], *, left: int) -> list[SamplePair]:
    """Return all pairs where they fit; else the best and worst by DINO, and every n-th of the others."""
    num = len(pairs)
    while num:
        chosen = choose(pairs, num)
        needed = sum(map(measure, chosen))
        if needed <= left:
            return chosen
        num = max(0, min(num - 1, num * max(left, 0) // needed))
    return []


def choose(pairs: Sequence[SamplePair], num: int) -> list[SamplePair]:
    """Return `num` pairs in their order: a quarter best, a quarter worst, the rest every n-th."""
    if num >= len(pairs):
        return list(pairs)
    ranked = sorted(range(len(pairs)), key=lambda row: pairs[row].rank("dino") or 0.0)
    ends = max(1, num // 4) if num > 1 else 0
    kept = {*ranked[:ends], *ranked[len(ranked) - ends :]}
    others = [row for row in range(len(pairs)) if row not in kept]
    kept.update(thin(others, num - len(kept)))
    return [pairs[row] for row in sorted(kept)]


def thin(items: Sequence[T], most: int | None) -> list[T]:
    """Return at most `most` items, evenly spaced."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def to_data_url(store: Store, ref: ObjectRef, *, max_side: int, is_generated: bool) -> str:
    """Return a stored image as a data URL: PNG where it is small, else WebP, marked where it is generated."""
    data = read_verified(store, ref)
    picture = decode_png(data)
    if max(picture.size) <= SMALL_SIDE:
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, **({"xmp": XMP.encode()} if is_generated else {}))
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
