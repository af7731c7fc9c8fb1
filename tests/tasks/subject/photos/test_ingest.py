"""What bad photos get."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from tasks.errors import ConfigError, SubjectRejected
from tasks.images import decode_png
from tasks.services.store.local import LocalStore
from tasks.subject.photos.decoding import decode
from tasks.subject.photos.ingest import Photo, check_photo, check_photos
from tests.support.config import make_subject_config
from tests.support.tiny import draw_photo, draw_photos

CONFIG = make_subject_config()


def check(folder: Path, store: LocalStore, **changes: object) -> object:
    return check_photos(make_subject_config(source=str(folder), **changes), store)  # type: ignore[arg-type]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def bomb() -> bytes:
    """Return a PNG of some 100 bytes that claims 60000x60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_good_photos_are_accepted(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=4)
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    assert len(photos.accepted) == 4
    assert photos.rejected == ()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text.jpg", b"I am no picture", "not a JPEG, PNG, WebP, GIF, AVIF or HEIC"),
        ("half.jpg", encode(draw_photo(size=256), "JPEG")[:4000], "damaged"),
        ("bomb.png", bomb(), "too large"),
        ("empty.png", b"", "empty"),
        ("tiff.png", encode(draw_photo(), "TIFF"), "not a JPEG, PNG, WebP, GIF, AVIF or HEIC"),
        ("small.png", encode(draw_photo(size=32), "PNG"), "too small"),
        ("black.png", encode(Image.new("RGB", (128, 128)), "PNG"), "almost one tone"),
        ("blur.png", encode(draw_photo(5).filter(ImageFilter.GaussianBlur(9)), "PNG"), "blurred"),
    ],
)
def test_a_bad_photo_is_rejected_with_its_reason(
    tmp_path: Path, store: LocalStore, name: str, data: bytes, reason: str
) -> None:
    draw_photos(tmp_path / "in", num=3)
    (tmp_path / "in" / name).write_bytes(data)
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    assert len(photos.accepted) == 3
    assert [(reject.name, reason in reject.reason) for reject in photos.rejected] == [(name, True)]


def test_re_encoded_and_resized_copies_of_a_photo_count_once(tmp_path: Path, store: LocalStore) -> None:
    image = draw_photo(size=256)
    (tmp_path / "in").mkdir()
    for number, (kind, size) in enumerate([("PNG", 256), ("JPEG", 256), ("WEBP", 200), ("GIF", 256), ("JPEG", 150)]):
        (tmp_path / "in" / f"{number}.{kind.lower()}").write_bytes(encode(image.resize((size, size)), kind))
    with pytest.raises(SubjectRejected, match=r"1 good photos in .*, 3 needed .*same as 0.png"):
        check(tmp_path / "in", store)


def test_too_few_photos_are_rejected(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=2)
    with pytest.raises(SubjectRejected, match="2 good photos in .*Add photos or lower subject.min_images"):
        check(tmp_path / "in", store)


def test_an_empty_or_missing_folder_is_rejected(tmp_path: Path, store: LocalStore) -> None:
    with pytest.raises(SubjectRejected, match="0 good photos"):
        check(tmp_path, store)
    with pytest.raises(ConfigError, match="is not a folder"):
        check(tmp_path / "nowhere", store)


def test_too_many_photos_are_refused_before_any_is_read(tmp_path: Path, store: LocalStore) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"never opened")
    with pytest.raises(SubjectRejected, match="6 photos in .*at most 5 are read"):
        check(tmp_path, store, max_images=5)


def test_orientation_is_applied_and_metadata_dropped(tmp_path: Path, store: LocalStore) -> None:
    upright = draw_photo(size=128)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: pixels lie 90 degrees counter-clockwise
    exif[0x010E] = "canary-description"
    draw_photos(tmp_path / "in", num=3, seed=9)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "in" / "turned.png", exif=exif)
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    photo = next(photo for photo in photos.accepted if photo.name == "turned.png")
    assert Image.open(io.BytesIO(photo.png)).tobytes() == upright.tobytes()
    assert b"canary" not in photo.png


def test_external_symlinks_and_pipes_are_skipped_with_a_reason(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=3)
    (tmp_path / "in" / "link.png").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    assert len(photos.accepted) == 3
    assert photos.rejected == ()
    assert photos.skipped == (
        ("link.png", "a link that leads out of the folder; copy the photo itself"),
        ("pipe.png", "no regular file"),
    )


def test_photos_can_be_read_from_the_store(store: LocalStore) -> None:
    for index in range(3):
        store.put_bytes(f"uploads/rex/{index}.png", encode(draw_photo(index), "PNG"))
    photos = check_photos(make_subject_config(source="store:uploads/rex/"), store)
    assert len(photos.accepted) == 3


def test_transparent_and_gray_photos_become_rgb(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=1)
    rgba = draw_photo(1).convert("RGBA")
    rgba.putalpha(200)
    rgba.save(tmp_path / "in" / "alpha.png")
    draw_photo(2).convert("L").save(tmp_path / "in" / "gray.png")
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    assert [Image.open(io.BytesIO(photo.png)).mode for photo in photos.accepted] == ["RGB"] * 3


def test_the_alpha_channel_of_a_photo_becomes_its_subject_mask(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path, num=3)
    photo = Image.open(tmp_path / "photo-0.png").convert("RGBA")
    alpha = Image.new("L", photo.size, 0)
    alpha.paste(255, (20, 30, 100, 90))
    photo.putalpha(alpha)
    photo.save(tmp_path / "photo-0.png")
    checked = check_photos(make_subject_config(source=str(tmp_path)), store)
    by_name = {accepted.name: accepted for accepted in checked.accepted}
    assert by_name["photo-1.png"].mask_png is None
    mask_png = by_name["photo-0.png"].mask_png
    assert mask_png is not None
    assert Image.open(io.BytesIO(mask_png)).getbbox() == (20, 30, 100, 90)


def save_photo(path: Path, size: tuple[int, int]) -> None:
    """Write a drawn photo of any shape."""
    path.parent.mkdir(exist_ok=True)
    draw_photo(0, size=128).resize(size).save(path)


@pytest.mark.parametrize(("size", "expected"), [((400, 300), (200, 150)), ((300, 600), (150, 300)), ((180, 120), None)])
def test_photos_are_downscaled_to_working_side_on_the_short_side(
    tmp_path: Path, store: LocalStore, size: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    save_photo(tmp_path / "in" / "a.png", size)
    [photo] = check(tmp_path / "in", store, working_side=150, min_images=1, min_sharpness=0).accepted
    assert decode_png(photo.png).size == (expected or size)
    assert (photo.measures.width, photo.measures.height) == size


def test_photos_sent_to_models_have_a_long_side_of_at_most_1024_pixels(tmp_path: Path, store: LocalStore) -> None:
    save_photo(tmp_path / "in" / "a.png", (2000, 1600))
    [photo] = check(tmp_path / "in", store, working_side=1536, min_images=1, min_sharpness=0).accepted
    assert decode_png(photo.png).size == (1920, 1536)
    assert decode_png(photo.shown_png).size == (1024, 819)


def thin(width: int, height: int) -> bytes:
    """Return a small PNG of any shape, all of whose pixels are there."""
    return encode(Image.new("L", (width, height), 90), "PNG")


def claim(width: int, height: int) -> bytes:
    """Return a PNG that only claims its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (thin(1, 20_000), "too small: 1x20000 px"),
        (thin(1, 5_000), "too small: 1x5000 px"),
        (claim(1, 50_000_000), "too small: 1x50000000 px"),
        (claim(50_000_000, 1), "too small"),
        (claim(64, 900_000), "aspect ratio too high: 64x900000 px, at most 6:1"),
        (claim(2**31 - 1, 2**31 - 1), "too large"),
    ],
)
def test_an_extreme_aspect_ratio_rejects_one_photo_without_decoding_it(
    tmp_path: Path, store: LocalStore, data: bytes, reason: str
) -> None:
    import tracemalloc

    draw_photos(tmp_path / "in", num=5)
    (tmp_path / "in" / "thin.png").write_bytes(data)
    check(tmp_path / "in", store)  # libraries are loaded
    tracemalloc.start()
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000
    assert len(photos.accepted) == 5
    assert [reject.name for reject in photos.rejected] == ["thin.png"]
    assert reason in photos.rejected[0].reason


@pytest.mark.parametrize(
    "error", [OverflowError("x"), MemoryError(), RuntimeError("y"), KeyError("z"), RecursionError()]
)
def test_a_decoder_error_rejects_only_its_own_photo(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    draw_photos(tmp_path / "in", num=4)
    real = ImageOps.exif_transpose
    calls: list[int] = []

    def transpose(image: Image.Image) -> Image.Image:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", transpose)
    photos = check_photos(make_subject_config(source=str(tmp_path / "in")), store)
    assert (len(photos.accepted), len(photos.rejected)) == (3, 1)


HEIC = Path(__file__).parent / "photo.heic"


def encode_mpo() -> bytes:
    """Return what a phone writes: a JPEG with a second picture behind it."""
    return encode(draw_photo(3, size=256), "MPO", save_all=True, append_images=[draw_photo(4, size=256)])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("phone.jpg", encode_mpo()),
        ("phone.MPO", encode_mpo()),
        ("new.avif", encode(draw_photo(3, size=256), "AVIF")),
        ("apple.HEIC", HEIC.read_bytes()),
        ("photo.jfif", encode(draw_photo(3, size=256), "JPEG")),
    ],
)
def test_phone_photo_formats_are_decoded(tmp_path: Path, store: LocalStore, name: str, data: bytes) -> None:
    draw_photos(tmp_path, num=3)
    (tmp_path / name).write_bytes(data)
    photos = check_photos(make_subject_config(source=str(tmp_path)), store)
    assert photos.rejected == ()
    photo = next(photo for photo in photos.accepted if photo.name == name)
    expected = np.asarray(draw_photo(3, size=256), int)
    assert (photo.measures.width, photo.measures.height) == (256, 256)
    assert np.abs(np.asarray(Image.open(io.BytesIO(photo.png)), int) - expected).mean() < 6  # lossy


def test_every_skipped_file_is_reported_with_its_reason(tmp_path: Path, store: LocalStore) -> None:
    folder = tmp_path / "in"
    draw_photos(folder, num=3)
    (folder / "notes.txt").write_text("x")
    (folder / "raw.cr2").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "more").mkdir()
    draw_photo(5).save(folder / "more" / "5.png")
    (folder / "second-name.png").symlink_to("photo-1.png")
    (folder / "broken.png").symlink_to("nothing")
    (folder / "deep.png").symlink_to("more/5.png")
    photos = check_photos(make_subject_config(source=str(folder)), store)
    assert {photo.name for photo in photos.accepted} == {"photo-0.png", "photo-1.png", "photo-2.png", "deep.png"}
    assert [reject.name for reject in photos.rejected] == ["second-name.png"]
    assert dict(photos.skipped) == {
        "broken.png": "a link that leads nowhere",
        "more": "a folder; photos lie in one folder",
        "notes.txt": "not a photo by its name; JPEG, PNG, WebP, GIF, AVIF or HEIC are read",
        "raw.cr2": "not a photo by its name; JPEG, PNG, WebP, GIF, AVIF or HEIC are read",
    }


def test_the_error_for_too_few_photos_lists_the_skipped_files(tmp_path: Path, store: LocalStore) -> None:
    (tmp_path / "IMG_1.dng").write_bytes(b"x")
    with pytest.raises(SubjectRejected, match=r"IMG_1.dng: not a photo by its name"):
        check(tmp_path, store)


def test_of_near_duplicates_the_best_one_is_retained(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path, num=3)
    photo = draw_photo(5, size=256)
    photo.resize((128, 128)).save(tmp_path / "a-small.png")
    photo.save(tmp_path / "b-large.png")
    photo.filter(ImageFilter.GaussianBlur(1.2)).save(tmp_path / "c-soft.png")
    photos = check_photos(make_subject_config(source=str(tmp_path)), store)
    assert "b-large.png" in {accepted.name for accepted in photos.accepted}
    reasons = {reject.name: reject.reason for reject in photos.rejected}
    assert set(reasons) == {"a-small.png", "c-soft.png"}
    assert all("same as b-large.png, which is better" in reason for reason in reasons.values())


def test_a_large_jpeg_is_decoded_downscaled_and_records_its_original_size(tmp_path: Path, store: LocalStore) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = draw_photo(3, size=512).resize((3000, 2000))
    data = encode(image, "JPEG", exif=exif)
    photo = check_photo("a.jpg", data, make_subject_config(working_side=256))
    assert isinstance(photo, Photo)
    assert (photo.measures.width, photo.measures.height) == (2000, 3000)
    assert Image.open(io.BytesIO(photo.png)).size == (256, 384)
    decoded = decode(data, make_subject_config(working_side=256))
    assert min(decoded.image.size) < 2000


def sixteen_bits(channels: int, *, clear: int) -> bytes:
    """Return a PNG of 16 bits with a transparent colour, its left half of that colour."""
    values = np.linspace(20_000, 50_000, 120 * 100 * channels).reshape(120, 100, channels).astype(">u2")
    values[:, :50] = clear

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100, 120, 16, 0 if channels == 1 else 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(">H", clear) * channels), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


def test_a_16_bit_gray_photo_keeps_its_tonal_range_and_transparency() -> None:
    found = decode(sixteen_bits(1, clear=1000), CONFIG)
    assert np.array(found.image)[:, :50].min() == 255  # laid over white
    right = np.array(found.image)[:, 50:]
    assert (right.min(), right.max()) == (78, 195)
    assert found.mask is not None
    mask = np.array(found.mask)
    assert (mask[:, :50].max(), mask[:, 50:].min()) == (0, 255)
    assert decode(sixteen_bits(3, clear=1000), CONFIG).image.size == (100, 120)


@pytest.mark.parametrize("value", [9, 255, 65535])
def test_an_undefined_exif_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    found = decode(encode(draw_photo(0).resize((160, 120)), "JPEG", exif=exif), CONFIG)
    assert (found.size, found.image.size) == ((160, 120), (160, 120))


def test_a_non_numeric_exif_orientation_is_ignored() -> None:
    words = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0A\0\0\0\0\0\0\0"
    found = decode(encode(draw_photo(0).resize((160, 120)), "PNG", exif=words), CONFIG)
    assert found.size == (160, 120)


def test_the_total_pixels_of_all_photos_are_bounded(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_photos(tmp_path / "in", num=4, size=128)
    monkeypatch.setattr("tasks.subject.photos.ingest.MAX_PIXELS_IN_ALL", 3 * 128 * 128)
    with pytest.raises(SubjectRejected, match=r"more than .* megapixels .*subject.working_side"):
        check(tmp_path / "in", store)


def test_long_names_with_a_common_prefix_stay_unique(tmp_path: Path, store: LocalStore) -> None:
    paths = draw_photos(tmp_path / "in", num=3)
    for number, path in enumerate(paths[:2]):
        path.rename(path.with_name("x" * 245 + f"{number}.png"))
    names = [
        photo.name for photo in check_photos(CONFIG.model_copy(update={"source": str(tmp_path / "in")}), store).accepted
    ]
    assert len(set(names)) == 3
    assert max(map(len, names)) == 60
