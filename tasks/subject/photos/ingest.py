"""Ingest photos: decode, apply orientation, strip metadata, measure, drop near-duplicates."""

import hashlib
import math
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from tasks.errors import ConfigError, SubjectRejected
from tasks.images import encode_png, shrink_png
from tasks.manifests.subject import ImageMeasures
from tasks.services.store.base import Store
from tasks.subject.config import SubjectConfig
from tasks.subject.photos.decoding import READABLE, SUFFIXES, Unfit, decode
from tasks.subject.photos.quality import find_fault, hamming_distance, measure

MAX_BYTES = 64_000_000
MAX_PIXELS_IN_ALL = 2_000_000_000  # accepted photos are in memory together; up to 6 GB of RGB
THUMBNAIL_SIDE = 160
SHARPER = 1.5  # ratio of sharpness from which one near-duplicate counts as the sharper one
SHOWN_SIDE = 1024
DESCRIPTION = "subject.yaml"
"""Describes the subject beside its photos, where many subjects are run; see conf/subjects.py."""
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "mini" / "demo_subject"


@dataclass(frozen=True)
class Photo:
    """One decoded photo: its pixels as PNG, without metadata."""

    name: str
    sha256: str
    png: bytes
    measures: ImageMeasures
    mask_png: bytes | None = None
    """Where the subject is, as a gray PNG of the same size; None for a photo without cut-out."""
    num_pixels: int = 0
    """Pixels of the stored image."""

    @cached_property
    def shown_png(self) -> bytes:
        """The photo as sent to LLMs, at most 1024 px a side: more pixels cost more without adding information."""
        return shrink_png(self.png, max_side=SHOWN_SIDE)


@dataclass(frozen=True)
class Reject:
    """A rejected photo."""

    name: str
    sha256: str
    reason: str
    thumbnail: bytes | None


@dataclass(frozen=True)
class CheckedPhotos:
    """The photos of a source, by outcome."""

    accepted: tuple[Photo, ...]
    rejected: tuple[Reject, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    """Names and reasons of files that were not read at all."""
    unknown_world: str = ""
    """Why the photos are outside of the base model's domain, where training proceeds regardless."""

    def digests(self) -> list[str]:
        """Return the SHA-256 of every photo that was read, rejected ones included."""
        return [photo.sha256 for photo in self.accepted] + [reject.sha256 for reject in self.rejected]


def check_photos(config: SubjectConfig, store: Store) -> CheckedPhotos:
    """Read and check all photos of the source.

    Raises:
        SubjectRejected: too few good photos, with the reasons, or too many pixels in total.
        ConfigError: the source does not exist.

    """
    source = list_source(config, store)
    good: list[Photo] = []
    rejected: list[Reject] = []
    num_pixels = 0
    for name, read in source.files:
        # Read one by one: only the shrunk photos stay in memory.
        outcome = check_photo(name, read(), config)
        (good if isinstance(outcome, Photo) else rejected).append(outcome)  # type: ignore[arg-type]
        num_pixels += outcome.num_pixels if isinstance(outcome, Photo) else 0
        # In the loop, before memory runs out.
        if num_pixels > MAX_PIXELS_IN_ALL:
            raise SubjectRejected(
                f"the photos in {config.source} are more than {MAX_PIXELS_IN_ALL / 1e6:,.0f} megapixels as they are "
                "kept: choose fewer, or lower subject.working_side"
            )
    accepted, duplicates = drop_duplicates(good, config)
    rejected += duplicates
    left_out = [*((reject.name, reject.reason) for reject in rejected), *source.skipped]
    require_enough(len(accepted), config, left_out)
    return CheckedPhotos(tuple(accepted), tuple(rejected), tuple(source.skipped))


def require_enough(num_good: int, config: SubjectConfig, rejected: list[tuple[str, str]]) -> None:
    """Raise SubjectRejected where fewer than `min_images` are good; names up to six rejects."""
    if num_good >= config.min_images:
        return
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected[:6])
    raise SubjectRejected(
        f"{num_good} good photos in {config.source}, {config.min_images} needed"
        f"{' (' + reasons + ')' if reasons else ''}. Add photos or lower subject.min_images"
    )


@dataclass(frozen=True)
class PhotoSource:
    """The files of a source: (name, read function) of photos, (name, reason) of skipped entries."""

    files: Sequence[tuple[str, Callable[[], bytes]]]
    skipped: list[tuple[str, str]]


def list_source(config: SubjectConfig, store: Store) -> PhotoSource:
    """List the configured source without reading it. Raises ConfigError where it is no readable folder."""
    if config.source.startswith("store:"):
        keys = store.list_keys(config.source.removeprefix("store:"))
        wanted = [key for key in keys if key.lower().endswith(SUFFIXES)]
        check_number(len(wanted), config)
        names = (key.rsplit("/", 1)[-1] for key in keys if key not in wanted)
        skipped = [(clean_name(name), NO_PHOTO) for name in names if name != DESCRIPTION]
        files = [(clean_name(key.rsplit("/", 1)[-1]), partial(read_object, store, key)) for key in wanted]
        return PhotoSource(files, skipped)
    folder = DEMO_FOLDER if config.source == "demo" else Path(config.source)
    try:
        entries = sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        reason = "is not a folder" if not isinstance(error, PermissionError) else "can't be read"
        raise ConfigError(f"subject.source={config.source} {reason}; name a folder of photos") from error
    shown = [path for path in entries if not path.name.startswith(".") and path.name != DESCRIPTION]
    reasons = {path: find_skip_reason(path, folder) for path in shown}
    paths = [path for path, reason in reasons.items() if not reason]
    check_number(len(paths), config)
    skipped = [(clean_name(path.name), reason) for path, reason in reasons.items() if reason]
    return PhotoSource([(clean_name(path.name), partial(read_file, path)) for path in paths], skipped)


NO_PHOTO = f"not a photo by its name; {READABLE} are read"


def find_skip_reason(path: Path, folder: Path) -> str:
    """Return the reason to skip a folder entry, or an empty string."""
    if path.is_symlink():
        # A link to outside could expose any file of the machine; one within the folder is an alias of a photo.
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return "a link that leads nowhere"
        if not target.is_relative_to(folder.resolve()):
            return "a link that leads out of the folder; copy the photo itself"
    if path.is_dir():
        return "a folder; photos lie in one folder"
    if not path.is_file():
        return "no regular file"  # opening a FIFO would block
    return "" if path.suffix.lower() in SUFFIXES else NO_PHOTO


def read_object(store: Store, key: str) -> bytes:
    """Return an object's content; empty where it is too large or gone, which `decode` reports."""
    data = store.find_bytes(key) or b""
    return data if len(data) <= MAX_BYTES else b""


def read_file(path: Path) -> bytes:
    """Return a file's content; empty where it is too large or unreadable, which `decode` reports."""
    try:
        return path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    except OSError:
        return b""


def count_photos(source: str) -> int:
    """Return the number of photos in a folder by file suffix; 0 for a source in the store."""
    folder = DEMO_FOLDER if source == "demo" else Path(source)
    return sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir()) if folder.is_dir() else 0


def check_number(num_files: int, config: SubjectConfig) -> None:
    """Raise SubjectRejected for more than `max_images` photos."""
    if num_files > config.max_images:
        raise SubjectRejected(
            f"{num_files} photos in {config.source}, at most {config.max_images} are read: "
            "choose the best, or raise subject.max_images"
        )


def check_photo(name: str, data: bytes, config: SubjectConfig) -> Photo | Reject:
    """Decode, measure and shrink one photo; a `Reject` carries the reason."""
    # Of the file, not of its decoded pixels, which depend on the decoder's version.
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        decoded = decode(data, config)
    except Unfit as error:
        return Reject(name, sha256, str(error), None)
    width, height = decoded.size
    # Measured before shrinking, with the original size, which SDXL's micro-conditioning uses.
    measures = measure(decoded.image).model_copy(update={"width": width, "height": height})
    fault = "excluded by subject.excluded_photos" if name in config.excluded_photos else find_fault(measures, config)
    image = shrink(decoded.image, short_side=config.working_side or min(decoded.image.size))
    mask = decoded.mask
    if fault is None:
        mask_png = encode_png(mask.resize(image.size, Image.Resampling.BOX)) if mask else None
        return Photo(name, sha256, encode_png(image), measures, mask_png, image.width * image.height)
    return Reject(name, sha256, fault, shrink_png(encode_png(image), max_side=THUMBNAIL_SIDE))


def rank_quality(photo: Photo) -> tuple[int, int]:
    """Return a key that sorts the better photo first: the larger, then the clearly sharper."""
    # A rounded logarithm: near-equal sharpness doesn't decide.
    sharpness = max(photo.measures.sharpness, 1e-3)
    return -min(photo.measures.width, photo.measures.height), -round(math.log(sharpness, SHARPER))


def drop_duplicates(photos: Sequence[Photo], config: SubjectConfig) -> tuple[list[Photo], list[Reject]]:
    """Split off near-duplicates by perceptual hash; the larger, then the sharper photo is kept.

    Returns the kept photos in their given order, and the rejects.
    """
    kept: list[Photo] = []
    rejected: list[Reject] = []
    for photo in sorted(photos, key=rank_quality):
        for other in kept:
            distance = hamming_distance(photo.measures.perceptual_hash, other.measures.perceptual_hash)
            if distance <= config.duplicate_distance:
                reason = f"same as {other.name}, which is better (hashes differ in {distance} of 64 bits)"
                thumbnail = shrink_png(photo.png, max_side=THUMBNAIL_SIDE)
                rejected.append(Reject(photo.name, photo.sha256, reason, thumbnail))
                break
        else:
            kept.append(photo)
    # By identity, since hashing a Photo would hash its PNG.
    order = {id(photo): number for number, photo in enumerate(photos)}
    return sorted(kept, key=lambda photo: order[id(photo)]), rejected


def shrink(image: Image.Image, *, short_side: int) -> Image.Image:
    """Downscale to a short side of at most `short_side`, preserving the aspect ratio; never upscale."""
    factor = short_side / min(image.size)
    if factor >= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def clean_name(name: str) -> str:
    """Return a printable file name of at most 60 characters, without control and bidirectional characters.

    Truncated names end in a digest, so that they stay distinct.
    """
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else "?" for c in name)
    if len(kept) <= 60:
        return kept
    # `fsencode`: a name that is not UTF-8 holds lone surrogates, which `encode` refuses.
    return f"{kept[:48]}...{hashlib.sha256(os.fsencode(name)).hexdigest()[:9]}"
