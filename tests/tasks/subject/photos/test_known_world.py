"""The drawn-world model refuses photos of the real world, and none of its own."""

from pathlib import Path

import pytest
import skimage
from PIL import Image

from tasks.errors import SubjectRejected
from tasks.mini.recognition import MAX_DISTANCE, MIN_PSNR, Recognizer, draw_set
from tasks.mini.world.scenes import CLASS_NOUNS
from tasks.services.store.local import LocalStore
from tasks.subject.photos.ingest import check_photos
from tasks.subject.photos.known_world import check_class_noun, check_known_world, find_verdict
from tests.support.config import make_subject_config
from tests.support.tiny import draw_photos

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "motorcycle_left.png",
               "retina.jpg", "grass.png", "brick.png", "page.png")  # fmt: skip
FOLDER = Path(skimage.__file__).parent / "data"


def crop(name: str, num: int = 5) -> list[Image.Image]:
    """Return crops of a photograph, each of another part of it."""
    with Image.open(FOLDER / name) as opened:
        photo = opened.convert("RGB")
    side = int(min(photo.size) * 0.7)
    places = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 1.0)][:num]
    boxes = [(round(x * (photo.width - side)), round(y * (photo.height - side))) for x, y in places]
    return [photo.crop((left, top, left + side, top + side)) for left, top in boxes]


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_real_photographs_are_not_recognized_as_synthetic(recognizer: Recognizer, name: str) -> None:
    assert not recognizer.measure(crop(name)).is_drawn


def test_all_of_eighty_synthetic_subjects_are_recognized(recognizer: Recognizer) -> None:
    found = [recognizer.measure(draw_set(number, size=128, quality=75 if number % 2 else None)) for number in range(80)]
    assert [number for number, evidence in enumerate(found) if not evidence.is_drawn] == []
    # Not by a hair: another CPU's kernels round otherwise.
    assert min(evidence.psnr for evidence in found) > MIN_PSNR + 0.2
    assert max(evidence.distance for evidence in found) < MAX_DISTANCE - 0.3


def test_real_photos_are_rejected_with_three_alternatives_and_the_verdict_cached(
    tmp_path: Path, store: LocalStore
) -> None:
    for number, photo in enumerate(crop("chelsea.png")):
        photo.save(tmp_path / f"{number}.png")
    config = make_subject_config(source=str(tmp_path), duplicate_distance=0)
    photos = check_photos(config, store).accepted
    with pytest.raises(SubjectRejected, match=r"not of the drawn world.*draw a subject.*diffusion=sd15.*llm=openai"):
        check_known_world(photos, config, store)
    [key] = store.list_keys("known-world/")
    whole = store.find_bytes(key) or b""
    store.put_bytes(key, whole.replace(b"false", b"true "))  # a changed verdict is not believed
    allowed = config.model_copy(update={"allow_unknown": True})
    assert "not of the drawn world" in check_known_world(photos, allowed, store)
    assert store.find_bytes(key) == whole


def test_a_class_noun_outside_the_synthetic_world_is_rejected() -> None:
    config = make_subject_config(class_noun="cat")
    with pytest.raises(SubjectRejected, match=r"the drawn world has no cat \(it has: .*fish.*allow_unknown=true"):
        check_class_noun(config)
    assert "no cat" in check_class_noun(config.model_copy(update={"allow_unknown": True}))
    for noun in CLASS_NOUNS:
        assert check_class_noun(make_subject_config(class_noun=noun.capitalize())) == ""


def test_synthetic_photos_are_accepted(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=4)
    config = make_subject_config(source=str(tmp_path / "in"))
    assert check_known_world(check_photos(config, store).accepted, config, store) == ""


def test_a_cached_verdict_on_other_photos_is_ignored(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=4)
    drawn = check_photos(make_subject_config(source=str(tmp_path / "in")), store).accepted
    find_verdict(drawn, store)
    [key] = store.list_keys("known-world/")
    find_verdict(drawn[:3], store)
    [other] = set(store.list_keys("known-world/")) - {key}
    store.put_bytes(other, store.find_bytes(key) or b"")
    again = find_verdict(drawn[:3], store)
    assert store.find_bytes(other) != store.find_bytes(key)
    assert again.photos.startswith(Path(other).stem)
