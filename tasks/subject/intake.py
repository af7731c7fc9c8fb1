"""Read photos: decode fully, apply orientation, drop metadata, measure, find duplicates."""

import hashlib
import io
import struct
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.errors import ConfigError, SubjectRejected
from tasks.images import encode_png, shrink_png
from tasks.manifests import ImageMeasures
from tasks.services.store import Store
from tasks.subject.config import SubjectConfig
from tasks.subject.quality import count_different_bits, find_fault, measure

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MOST_BYTES = 64_000_000
THUMBNAIL_SIDE = 160
SHOWN_SIDE = 1024
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "mini" / "demo_subject"


@dataclass(frozen=True)
class Photo:
    """One decoded photo: its pixels as PNG, without metadata."""

    name: str
    sha256: str
    png: bytes
    measures: ImageMeasures
    mask_png: bytes | None = None
    """Where the subject is, as a gray PNG of the same size; None for a photo without cut-out."""

    @cached_property
    def shown_png(self) -> bytes:
        """The photo as models are shown it: larger pictures cost more and tell them no more."""
        return shrink_png(self.png, max_side=SHOWN_SIDE)


@dataclass(frozen=True)
class Reject:
    """One photo that is left out."""

    name: str
    sha256: str
    reason: str
    thumbnail: bytes | None


@dataclass(frozen=True)
class CheckedPhotos:
    """All photos of a source, sorted out."""

    accepted: tuple[Photo, ...]
    rejected: tuple[Reject, ...]

    def digests(self) -> list[str]:
        """Return the content digests of everything that was read."""
        return [photo.sha256 for photo in self.accepted] + [reject.sha256 for reject in self.rejected]


def check_photos(config: SubjectConfig, store: Store) -> CheckedPhotos:
    """Read and check every photo of the source.

    Raises:
        SubjectRejected: too few good photos; names each reject with its reason.
        ConfigError: the source does not exist.

    """
    accepted: list[Photo] = []
    rejected: list[Reject] = []
    for name, data in read_source(config, store):
        outcome = check_photo(name, data, config, accepted)
        (accepted if isinstance(outcome, Photo) else rejected).append(outcome)  # type: ignore[arg-type]
    require_enough(len(accepted), config, [(reject.name, reject.reason) for reject in rejected])
    return CheckedPhotos(tuple(accepted), tuple(rejected))


def require_enough(num_good: int, config: SubjectConfig, rejected: list[tuple[str, str]]) -> None:
    """Raise SubjectRejected where there are fewer good photos than needed."""
    if num_good >= config.min_images:
        return
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected[:6])
    raise SubjectRejected(
        f"{num_good} good photos in {config.source}, {config.min_images} needed"
        f"{' (' + reasons + ')' if reasons else ''}. Add photos or lower subject.min_images"
    )


def read_source(config: SubjectConfig, store: Store) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of the source that claims to be a photo."""
    if config.source.startswith("store:"):
        prefix = config.source.removeprefix("store:")
        names = [key for key in store.list_keys(prefix) if key.lower().endswith(SUFFIXES)]
        check_number(len(names), config)
        for key in names:
            yield clean_name(key.rsplit("/", 1)[-1]), store.find_bytes(key) or b""
        return
    folder = DEMO_FOLDER if config.source == "demo" else Path(config.source)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        reason = "is not a folder" if not isinstance(error, PermissionError) else "can't be read"
        raise ConfigError(f"subject.source={config.source} {reason}; name a folder of photos") from error
    # Links and pipes are passed over: a link could lead anywhere, a pipe would wait for ever.
    paths = [p for p in entries if p.is_file() and not p.is_symlink()]
    paths = [path for path in paths if path.suffix.lower() in SUFFIXES]
    check_number(len(paths), config)
    for path in paths:
        try:
            yield clean_name(path.name), path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
        except OSError:
            yield clean_name(path.name), b""


def count_photos(source: str) -> int:
    """Return how many files of a folder claim to be photos; 0 where it can't be told without reading."""
    folder = DEMO_FOLDER if source == "demo" else Path(source)
    return sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir()) if folder.is_dir() else 0


def check_number(num_files: int, config: SubjectConfig) -> None:
    """Refuse a source with more photos than will be read."""
    if num_files > config.max_images:
        raise SubjectRejected(
            f"{num_files} photos in {config.source}, at most {config.max_images} are read: "
            "choose the best, or raise subject.max_images"
        )


def check_photo(name: str, data: bytes, config: SubjectConfig, accepted: list[Photo]) -> Photo | Reject:
    """Decode and measure one photo; compare it with those already accepted."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image, mask = decode(data, max_pixels=config.max_pixels)
    except Unfit as error:
        return Reject(name, sha256, str(error), None)
    measures = measure(image)
    fault = find_fault(measures, config)
    for other in accepted:
        distance = count_different_bits(measures.perceptual_hash, other.measures.perceptual_hash)
        if fault is None and distance <= config.duplicate_distance:
            fault = f"same as {other.name} (hashes differ in {distance} of 64 bits)"
    image = shrink(image, short_side=config.working_side or min(image.size))
    if fault is None:
        mask_png = encode_png(mask.resize(image.size, Image.Resampling.BOX)) if mask else None
        return Photo(name, sha256, encode_png(image), measures, mask_png)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return Reject(name, sha256, fault, encode_png(image))


def shrink(image: Image.Image, *, short_side: int) -> Image.Image:
    """Return a picture whose short side is at most this, its aspect kept: training crops along the long one."""
    factor = short_side / min(image.size)
    if factor >= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def decode(data: bytes, *, max_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    """Return the upright RGB pixels of an encoded photo, and its cut-out. Raises Unfit with the reason."""
    if not data:
        raise Unfit("empty, unreadable, or over 64 MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    raise Unfit(f"too large: {opened.width}x{opened.height} px (subject.max_pixels)")
                if getattr(opened, "is_animated", False):
                    raise Unfit("animated")
                upright = ImageOps.exif_transpose(opened)
                return flatten(upright), find_mask(upright)
    except Image.DecompressionBombError as error:
        raise Unfit("too large to decode (subject.max_pixels)") from error
    except UnidentifiedImageError as error:
        raise Unfit("not a JPEG, PNG, WebP or GIF picture, whatever its name says") from error
    # Pillow answers damaged files and metadata with many kinds of errors.
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        raise Unfit(f"damaged: {error}") from error


class Unfit(Exception):
    """Why a photo can't be used."""


def flatten(image: Image.Image) -> Image.Image:
    """Return RGB pixels over white, rebuilt so that no metadata goes along."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        base = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(base, layer)
    elif image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    rgb = image.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def find_mask(image: Image.Image) -> Image.Image | None:
    """Return the opacity of a photo that was cut out, or None where all or nothing is opaque."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    low, high = alpha.getextrema()
    return alpha if low < 128 <= high else None  # type: ignore[operator]


def clean_name(name: str) -> str:
    """Return a file name that is safe to print: no control or direction marks, at most 60 letters."""
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else "?" for c in name)
    return kept if len(kept) <= 60 else kept[:56] + "..."
