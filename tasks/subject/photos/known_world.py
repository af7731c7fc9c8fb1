"""Check that photos are from the domain of the shipped base model, which can only draw its synthetic world.

Fine-tuning on other photos succeeds without an error and yields unrelated images.
"""

from collections.abc import Sequence

from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt, SubjectRejected
from tasks.images import decode_png
from tasks.services.store.base import Store
from tasks.stage.digests import digest, dump_signed, load_signed
from tasks.subject.config import SubjectConfig
from tasks.subject.photos.ingest import Photo

VERSION = 1  # of the measures and their limits
REMEDIES = (
    "draw a subject of it (python -m tasks.mini.world subject --help), or take a base model of the real world on a "
    "GPU (diffusion=sd15) with a hosted LLM (llm=openai), or set subject.allow_unknown=true"
)


class Verdict(BaseModel):
    """The domain check's result for a set of photos."""

    photos: str
    """Digest of the photos."""
    psnr: float
    distance: float
    is_drawn: bool


def check_class_noun(config: SubjectConfig) -> str:
    """Return why the class noun is unknown, or an empty string. Raises SubjectRejected unless `allow_unknown`."""
    from tasks.mini.world.scenes import CLASS_NOUNS

    if config.class_noun.lower() in CLASS_NOUNS:
        return ""
    reason = f"the drawn world has no {config.class_noun} (it has: {', '.join(CLASS_NOUNS)})"
    return refuse(reason, config)


def check_known_world(photos: Sequence[Photo], config: SubjectConfig, store: Store) -> str:
    """Return why photos or noun are unknown, or an empty string. Raises SubjectRejected unless `allow_unknown`."""
    reason = check_class_noun(config)
    verdict = find_verdict(photos, store)
    if verdict.is_drawn:
        return reason
    return refuse(
        "the photos are not of the drawn world, the only one that the shipped model knows "
        f"(reconstruction {verdict.psnr:.1f} dB, embedding distance {verdict.distance:.1f})",
        config,
    )


def refuse(reason: str, config: SubjectConfig) -> str:
    """Return the reason under `allow_unknown`. Raises SubjectRejected otherwise."""
    if config.allow_unknown:
        return reason
    raise SubjectRejected(f"{reason}: {REMEDIES}")


def find_verdict(photos: Sequence[Photo], store: Store) -> Verdict:
    """Return the verdict on a set of photos, cached in the store by their digests."""
    name = digest([VERSION, sorted(photo.sha256 for photo in photos)])
    key = f"known-world/{name[:32]}.json"
    data = store.find_bytes(key)
    if data is not None:
        try:
            known = load_signed(Verdict, data)
            # A verdict that was copied under another key must not clear other photos.
            if known.photos == name:
                return known
        except ArtifactCorrupt:
            pass  # recomputed and replaced below
    from tasks.mini.recognition import Recognizer

    evidence = Recognizer().measure([decode_png(photo.png) for photo in photos])
    verdict = Verdict(photos=name, psnr=evidence.psnr, distance=evidence.distance, is_drawn=evidence.is_drawn)
    store.put_bytes(key, dump_signed(verdict))
    return verdict
