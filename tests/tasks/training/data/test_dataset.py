"""Cached posteriors and batches by counter."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from tasks.diffusion.registry import load_model
from tasks.errors import ArtifactCorrupt
from tasks.services.store.local import LocalStore
from tasks.training.data import rng
from tasks.training.data.batches import BatchFactory
from tasks.training.data.buckets import Size
from tasks.training.data.datamodule import SampleIndices
from tasks.training.data.latent_cache import fetch_latents, is_valid, store_latents
from tasks.training.data.latents import tokenize_prompts
from tasks.training.data.preprocessing import CropFlip, locate_crops, plan_crops, preprocess_image
from tests.support.tiny import describe_image, make_spec, train_here
from tests.support.tiny_families import MAKERS, open_family

CPU = torch.device("cpu")
SQUARE = Size(32, 32)


def test_cached_latents_equal_uncached_ones(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, flip_probability=0.5)
    model = load_model(spec.diffusion)
    [batch] = BatchFactory(model, spec).make([0, 1], CPU)
    items = rng.choose_items(3, seed=spec.seed, purpose="instance/item", indices=[0, 1])
    flips = rng.draw_flags(0.5, seed=spec.seed, purpose="instance/flip", indices=[0, 1])
    for row, (item, flip) in enumerate(zip(items, flips, strict=True)):
        image = spec.instance_images[item]
        pixels = preprocess_image(image, size=SQUARE).pixels
        posterior = model.encode_images((pixels.flip(-1) if flip else pixels)[None])
        noise = rng.draw_normal(
            tuple(posterior.mean.shape[1:]), seed=spec.seed, purpose="instance/posterior", indices=[row]
        )
        expected = posterior.mean[0] + posterior.std[0] * noise[0]
        torch.testing.assert_close(batch.latents[row], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_is_instances_then_class_images_with_their_own_prompts(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder)
    model = load_model(spec.diffusion)
    [batch] = BatchFactory(model, spec).make([0, 1], CPU)
    expected = model.tokenize(["a photo of sks fish"] * 2 + ["a photo of a fish"] * 2)
    assert torch.equal(batch.input_ids, expected)
    assert batch.latents.shape == batch.noise.shape == (4, 4, 16, 16)
    assert not torch.equal(batch.noise[:2], batch.noise[2:])


def test_an_overlong_caption_is_truncated_at_a_phrase_boundary(tmp_path: Path, tiny_model_folder: Path) -> None:
    long = "a photo of sks fish in the snow, " + "on the beach " * 12 + ", at night"
    spec = make_spec(tmp_path, tiny_model_folder, max_train_steps=1)
    first = spec.instance_images[0].model_copy(update={"prompt": long})
    spec = spec.model_copy(update={"instance_images": (first, *spec.instance_images[1:])})
    model = load_model(spec.diffusion)
    assert model.truncate_prompts(long) == {"text_encoder": "a photo of sks fish in the snow"}
    [ids] = tokenize_prompts(model, (first,))
    assert torch.equal(ids, model.tokenize(["a photo of sks fish in the snow"])[0])
    run = train_here(tmp_path, tiny_model_folder, spec=spec)
    note = json.loads(run.events.read_text().splitlines()[0])["text"]
    assert note == 'text_encoder reads 32 tokens of a caption: it gets "a photo of sks fish in the snow"'


@pytest.mark.parametrize(("family", "t5"), [("stable_diffusion_3", "text_encoder_3"), ("flux", "text_encoder_2")])
def test_a_caption_is_truncated_only_for_text_encoders_with_a_shorter_context(
    tmp_path: Path, family: str, t5: str
) -> None:
    folder = MAKERS[family](tmp_path / "base" / "model")
    spec = make_spec(tmp_path, folder, max_train_steps=1, method="lora")
    spec = spec.model_copy(update={"diffusion": spec.diffusion.model_copy(update={"family": family})})
    long = "a photo of sks fish, " + ", ".join(["in the snow on the beach"] * 24)
    model = open_family(family, folder)
    [ids] = model.split_ids(tokenize_prompts(model, (spec.instance_images[0].model_copy(update={"prompt": long}),)))[t5]
    words = model.tokenizers[t5](long).input_ids
    assert 140 < len(words) < model.max_length(t5)
    assert ids[: len(words)].tolist() == words
    given = model.truncate_prompts(long)
    assert given[t5] == long
    assert len(model.tokenizers["text_encoder"](given["text_encoder"]).input_ids) <= 77
    assert long.startswith(given["text_encoder"])
    first = spec.instance_images[0].model_copy(update={"prompt": long})
    run = train_here(tmp_path, folder, spec=spec.model_copy(update={"instance_images": (first,)}))
    notes = [
        event["text"] for event in map(json.loads, run.events.read_text().splitlines()) if event["event"] == "note"
    ]
    assert not any(note.startswith(t5) for note in notes)
    assert notes[0].startswith("text_encoder reads 77 tokens of a caption")


def test_time_ids_hold_the_original_photo_size_not_the_downscaled_one(tmp_path: Path) -> None:
    folder = MAKERS["stable_diffusion_xl"](tmp_path / "base" / "model")
    spec = make_spec(tmp_path, folder)
    diffusion = spec.diffusion.model_copy(update={"family": "stable_diffusion_xl"})
    images = tuple(i.model_copy(update={"original_width": 4000, "original_height": 3000}) for i in spec.instance_images)
    conditioned = spec.model_copy(update={"diffusion": diffusion, "instance_images": images})
    model = open_family("stable_diffusion_xl", folder)
    [batch] = BatchFactory(model, conditioned).make([0, 1], CPU)
    assert batch.time_ids[:2, :2].tolist() == [[3000, 4000]] * 2
    assert batch.time_ids[2:, :2].tolist() == [[128, 128]] * 2  # class images are as they were drawn
    # Cached latents hold the sizes: another original is another file.
    unconditioned = spec.model_copy(update={"diffusion": diffusion})
    assert next(iter(conditioned.latents_paths())) != next(iter(unconditioned.latents_paths()))
    assert conditioned.fingerprint() != unconditioned.fingerprint()


def test_two_ranks_together_get_the_sample_indices_of_one_rank(tmp_path: Path, tiny_model_folder: Path) -> None:
    one = make_spec(tmp_path, tiny_model_folder, train_batch_size=4)
    two = make_spec(tmp_path, tiny_model_folder, train_batch_size=2)
    whole = torch.stack(list(islice(SampleIndices(one, start_step=0, rank=0, world_size=1), 5)))
    ranks = [torch.stack(list(islice(SampleIndices(two, start_step=0, rank=rank, world_size=2), 5))) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(ranks, 1))


def test_resuming_continues_the_sample_indices(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, gradient_accumulation_steps=3)
    whole = torch.stack(list(islice(SampleIndices(spec, start_step=0, rank=0, world_size=1), 12)))
    rest = torch.stack(list(islice(SampleIndices(spec, start_step=2, rank=0, world_size=1), 6)))
    assert torch.equal(whole[6:], rest)


def test_preprocessing_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    wide.save(tmp_path / "wide.png")
    path = tmp_path / "wide.png"
    loaded = preprocess_image(describe_image(path), size=SQUARE)
    pixels = loaded.pixels
    assert loaded.time_ids == [32, 96, 0, 32, 32, 32]
    assert torch.equal(pixels[2], torch.ones(32, 32))
    assert torch.equal(pixels[0], -torch.ones(32, 32))


def test_a_photo_that_changed_after_qc_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder)
    Path(spec.instance_images[1].path).write_bytes(Path(spec.instance_images[0].path).read_bytes())
    with pytest.raises(ArtifactCorrupt, match="changed after it was checked"):
        BatchFactory(load_model(spec.diffusion), spec)


def test_latents_are_encoded_once_and_shared_by_all_runs(
    tmp_path: Path, tiny_model_folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tmp_path / "first", tiny_model_folder)
    model = load_model(spec.diffusion)
    [first] = BatchFactory(model, spec).make([0, 1, 2], CPU)
    again = spec.model_copy(update={"latent_folder": str(tmp_path / "elsewhere"), "seed": spec.seed})
    assert fetch_latents(store, again) == 0
    store_latents(store, spec)
    assert fetch_latents(store, again) == len(spec.instance_images) + len(spec.class_images) > 0
    monkeypatch.setattr(type(model), "encode_images", None)  # calling it would be an error
    [second] = BatchFactory(model, again).make([0, 1, 2], CPU)
    assert torch.equal(first.latents, second.latents)
    changed = spec.model_copy(update={"instance_images": spec.instance_images[:2]})
    with pytest.raises(TypeError):
        BatchFactory(model, changed)


def test_damaged_latents_in_the_store_are_encoded_again(
    tmp_path: Path, tiny_model_folder: Path, store: LocalStore
) -> None:
    spec = make_spec(tmp_path / "first", tiny_model_folder)
    BatchFactory(load_model(spec.diffusion), spec)
    store_latents(store, spec)
    name = spec.latents_path("instance", SQUARE).name
    store.put_bytes(f"latents/{name}", b"x" * spec.latents_path("instance", SQUARE).stat().st_size)
    again = spec.model_copy(update={"latent_folder": str(tmp_path / "elsewhere")})
    assert fetch_latents(store, again) == len(spec.class_images)
    assert not is_valid(again.latents_path("instance", SQUARE))
    assert is_valid(again.latents_path("class", SQUARE))
    BatchFactory(load_model(spec.diffusion), again)
    assert again.latents_path("instance", SQUARE).read_bytes() == spec.latents_path("instance", SQUARE).read_bytes()
    store_latents(store, again)
    assert store.find_bytes(f"latents/{name}") == spec.latents_path("instance", SQUARE).read_bytes()


def test_crop_and_flip_settings_change_the_latent_cache_path(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder)
    crops, flips, rate = (
        spec.model_copy(update={"training": spec.training.model_copy(update=change)})
        for change in ({"num_crop_variants": 2}, {"flip_probability": 0.5}, {"learning_rate": 1.0})
    )
    paths = [s.latents_path("instance", SQUARE) for s in (spec, crops, flips)]
    assert len(set(paths)) == 3
    assert rate.latents_path("instance", SQUARE) == spec.latents_path("instance", SQUARE)


def test_a_crop_is_centered_on_the_box_of_the_inspection(tmp_path: Path) -> None:
    Image.new("RGB", (96, 32), "red").save(tmp_path / "photo.png")
    plain = describe_image(tmp_path / "photo.png")
    boxed = plain.model_copy(update={"focus": (0.25, 0.5)})
    assert preprocess_image(plain, size=SQUARE).time_ids[2:4] == [0, 32]
    assert preprocess_image(boxed, size=SQUARE).time_ids[2:4] == [0, 8]


def test_a_crop_is_centered_on_the_subject_mask(tmp_path: Path) -> None:
    Image.new("RGB", (96, 32), "red").save(tmp_path / "photo.png")
    mask = Image.new("L", (96, 32), 0)
    mask.paste(255, (70, 8, 90, 24))
    mask.save(tmp_path / "mask.png")
    image = describe_image(tmp_path / "photo.png", mask=tmp_path / "mask.png")
    loaded = preprocess_image(image, size=SQUARE)
    assert loaded.time_ids[2:4] == [0, 64]
    assert loaded.mask.sum() == 20 * 16
    flipped = preprocess_image(image, size=SQUARE, variant=CropFlip(is_flipped=True))
    assert flipped.time_ids[3] == 0
    assert torch.equal(flipped.mask, loaded.mask.flip(-1))


def test_crops_are_located_as_preprocessing_cuts_them(tmp_path: Path, tiny_model_folder: Path) -> None:
    Image.new("RGB", (96, 32), "red").save(tmp_path / "photo.png")
    spec = make_spec(tmp_path / "spec", tiny_model_folder)
    boxed = describe_image(tmp_path / "photo.png").model_copy(update={"focus": (0.25, 0.5)})
    spec = spec.model_copy(update={"instance_images": (boxed, *spec.instance_images)})
    found = locate_crops(spec)
    assert found[boxed.sha256] == ((pytest.approx(8 / 96), 0.0, pytest.approx(40 / 96), 1.0),)
    assert len(found) == len({image.sha256 for image in spec.instance_images})
    several = spec.training.model_copy(update={"num_crop_variants": 3, "flip_probability": 0.5})
    random = locate_crops(spec.model_copy(update={"training": several}))[boxed.sha256]
    assert len(set(random)) == 3, "flipped crops are not repeated"
    variants = [variant for variant in plan_crops(spec.model_copy(update={"training": several}), 0)][:3]
    cut = [preprocess_image(boxed, size=SQUARE, variant=variant).time_ids[3] for variant in variants]
    assert [round(96 * box[0]) for box in random] == cut
