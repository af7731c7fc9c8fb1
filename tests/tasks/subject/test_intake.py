"""What bad photos get."""

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from tasks.errors import ConfigError, SubjectRejected
from tasks.images import decode_png
from tasks.services.store import LocalStore
from tasks.subject.config import SubjectConfig
from tasks.subject.intake import check_photos
from tests.tiny import draw_photo, draw_photos


def check(folder: Path, store: LocalStore, **changes: object) -> object:
    return check_photos(SubjectConfig(source=str(folder), class_noun="fish", **changes), store)  # type: ignore[arg-type]


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
    photos = check_photos(SubjectConfig(source=str(tmp_path / "in"), class_noun="fish"), store)
    assert len(photos.accepted) == 4
    assert photos.rejected == ()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text.jpg", b"I am no picture", "not a JPEG, PNG, WebP or GIF"),
        ("half.jpg", encode(draw_photo(size=256), "JPEG")[:4000], "damaged"),
        ("bomb.png", bomb(), "too large"),
        ("empty.png", b"", "empty"),
        ("tiff.png", encode(draw_photo(), "TIFF"), "not a JPEG, PNG, WebP or GIF"),
        ("small.png", encode(draw_photo(size=32), "PNG"), "too small"),
        ("black.png", encode(Image.new("RGB", (128, 128)), "PNG"), "almost one tone"),
        ("blur.png", encode(draw_photo(5).filter(ImageFilter.GaussianBlur(9)), "PNG"), "blurred"),
    ],
)
def test_a_bad_photo_is_left_out_with_its_reason(
    tmp_path: Path, store: LocalStore, name: str, data: bytes, reason: str
) -> None:
    draw_photos(tmp_path / "in", num=3)
    (tmp_path / "in" / name).write_bytes(data)
    photos = check_photos(SubjectConfig(source=str(tmp_path / "in"), class_noun="fish"), store)
    assert len(photos.accepted) == 3
    assert [(reject.name, reason in reject.reason) for reject in photos.rejected] == [(name, True)]


def test_the_same_photo_five_times_is_one(tmp_path: Path, store: LocalStore) -> None:
    image = draw_photo(size=256)
    (tmp_path / "in").mkdir()
    for number, (kind, size) in enumerate([("PNG", 256), ("JPEG", 256), ("WEBP", 200), ("GIF", 256), ("JPEG", 150)]):
        (tmp_path / "in" / f"{number}.{kind.lower()}").write_bytes(encode(image.resize((size, size)), kind))
    with pytest.raises(SubjectRejected, match=r"1 good photos in .*, 3 needed .*same as 0.png"):
        check(tmp_path / "in", store)


def test_two_photos_where_three_are_needed(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=2)
    with pytest.raises(SubjectRejected, match="2 good photos in .*Add photos or lower subject.min_images"):
        check(tmp_path / "in", store)


def test_an_empty_and_a_missing_folder(tmp_path: Path, store: LocalStore) -> None:
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
    photos = check_photos(SubjectConfig(source=str(tmp_path / "in"), class_noun="fish"), store)
    photo = next(photo for photo in photos.accepted if photo.name == "turned.png")
    assert Image.open(io.BytesIO(photo.png)).tobytes() == upright.tobytes()
    assert b"canary" not in photo.png


def test_links_and_pipes_are_passed_over(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=3)
    (tmp_path / "in" / "link.png").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    photos = check_photos(SubjectConfig(source=str(tmp_path / "in"), class_noun="fish"), store)
    assert len(photos.accepted) == 3
    assert photos.rejected == ()


def test_photos_can_lie_in_the_store(store: LocalStore) -> None:
    for index in range(3):
        store.put_bytes(f"uploads/rex/{index}.png", encode(draw_photo(index), "PNG"))
    photos = check_photos(SubjectConfig(source="store:uploads/rex/", class_noun="fish"), store)
    assert len(photos.accepted) == 3


def test_transparent_and_gray_photos_become_rgb(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=1)
    rgba = draw_photo(1).convert("RGBA")
    rgba.putalpha(200)
    rgba.save(tmp_path / "in" / "alpha.png")
    draw_photo(2).convert("L").save(tmp_path / "in" / "gray.png")
    photos = check_photos(SubjectConfig(source=str(tmp_path / "in"), class_noun="fish"), store)
    assert [Image.open(io.BytesIO(photo.png)).mode for photo in photos.accepted] == ["RGB"] * 3


def test_a_cut_out_photo_keeps_where_its_subject_is(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path, num=3)
    photo = Image.open(tmp_path / "photo-0.png").convert("RGBA")
    alpha = Image.new("L", photo.size, 0)
    alpha.paste(255, (20, 30, 100, 90))
    photo.putalpha(alpha)
    photo.save(tmp_path / "photo-0.png")
    checked = check_photos(SubjectConfig(source=str(tmp_path), class_noun="fish"), store)
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
def test_photos_are_kept_with_the_working_side_on_their_short_side(
    tmp_path: Path, store: LocalStore, size: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    save_photo(tmp_path / "in" / "a.png", size)
    [photo] = check(tmp_path / "in", store, working_side=150, min_images=1, min_sharpness=0).accepted
    assert decode_png(photo.png).size == (expected or size)
    assert (photo.measures.width, photo.measures.height) == size


def test_models_are_shown_at_most_a_thousand_pixels_of_a_large_photo(tmp_path: Path, store: LocalStore) -> None:
    save_photo(tmp_path / "in" / "a.png", (2000, 1600))
    [photo] = check(tmp_path / "in", store, working_side=1536, min_images=1, min_sharpness=0).accepted
    assert decode_png(photo.png).size == (1920, 1536)
    assert decode_png(photo.shown_png).size == (1024, 819)
