"""Rebuild every mini model from seeds, on a CPU or a GPU.

    python -m tasks.mini.pretrain --work build/mini --out tasks/mini/weights

Each part resumes from its saved state. `clip_vision` and `vae_decoder` continue training of halves that no other part
depends on, so they can run beside or after `unet`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from tasks.mini.pretrain import models
from tasks.mini.pretrain.dataset import label_of, load_or_render, scene_of, view_of
from tasks.mini.pretrain.loop import PretrainLoop
from tasks.mini.pretrain.tokens import MAX_LENGTH, write_tokenizer
from tasks.mini.world.scenes import CLASS_NOUNS, PLACE_PHRASES, PLACES, caption_scene

SCENES_SEED, VIEWS_SEED = 1, 2
NUM_SCENES, NUM_VIEWS, VIEWS_EACH = 32_000, 24_000, 4
CAPTION_DROPOUT = 0.1
PARTS = ("classifier", "clip", "dino", "vae", "unet", "clip_vision", "vae_decoder", "export")


@dataclass(frozen=True)
class PartSettings:
    """Hyper-parameters of one part."""

    num_steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float = 0.999


SETTINGS = {
    # num_steps, batch_size, learning_rate, ema_decay
    "classifier": PartSettings(500, 64, 2e-3, 0.99),
    "clip": PartSettings(1600, 96, 1e-3, 0.995),
    "dino": PartSettings(1200, 96, 7e-4, 0.995),
    "vae": PartSettings(1700, 16, 1e-3, 0.998),
    "clip_vision": PartSettings(3500, 96, 7e-4, 0.995),
    "vae_decoder": PartSettings(1200, 16, 5e-4, 0.998),
    "unet": PartSettings(8800, 48, 8e-4, 0.998),
}


class Pretrainer:
    """Holds the rendered scenes and trains the parts; a part that another depends on is loaded or trained first."""

    def __init__(self, work: Path, device: torch.device) -> None:
        self.work = work
        self.device = device
        self.images = load_or_render(work / "scenes.npy", seed=SCENES_SEED, num=NUM_SCENES)

    def loop(self, name: str, module: nn.Module) -> PretrainLoop:
        """Return the loop that trains one part."""
        s = SETTINGS[name]
        return PretrainLoop(
            module,
            folder=self.work / name,
            num_steps=s.num_steps,
            learning_rate=s.learning_rate,
            ema_decay=s.ema_decay,
            device=self.device,
        )

    def draw_indices(self, name: str, step: int, total: int) -> np.ndarray:
        """Return the sample indices of one step, `(batch_size,)`."""
        # Seeded by (part, step), not by a running generator: a resumed run draws the same batches. Sorted, so that
        # reads of the memory-mapped images move forward.
        rng = np.random.default_rng([PARTS.index(name), step])
        return np.sort(rng.choice(total, SETTINGS[name].batch_size, replace=False))

    def pixels(self, indices: np.ndarray) -> Tensor:
        """Return scenes as ``(B, 3, 64, 64)`` in [-1, 1]."""
        return models.to_pixel_values(torch.from_numpy(self.images[indices])).to(self.device)

    def captions(self, indices: np.ndarray, step: int) -> list[str]:
        """Return one caption per scene, phrased anew at every step."""
        return [caption_scene(scene_of(SCENES_SEED, int(i)), np.random.default_rng([9, step, int(i)])) for i in indices]

    def tokenizer(self) -> CLIPTokenizer:
        """Return the tokenizer over all words of the world."""
        folder = self.work / "tokenizer"
        if not (folder / "vocab.json").exists():
            words = {w for i in range(4000) for c in self.captions(np.array([i]), 0) for w in c.split()}
            write_tokenizer(folder, words)
        return CLIPTokenizer.from_pretrained(folder)

    def encode(self, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
        """Return token ids ``(B, 32)``."""
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        input_ids: Tensor = tokens.input_ids
        return input_ids.to(self.device)

    def classifier(self) -> nn.Module:
        """Train the classifier that evaluates the base model, on scene labels."""
        module = models.SceneClassifier()
        labels = np.array([label_of(scene_of(SCENES_SEED, i)) for i in range(NUM_SCENES)])

        def loss(step: int) -> Tensor:
            indices = self.draw_indices("classifier", step, NUM_SCENES)
            targets = torch.from_numpy(labels[indices]).to(self.device)
            rng = torch.Generator().manual_seed(step)
            noise = torch.randn(len(indices), 3, 64, 64, generator=rng).to(self.device)
            # Noise augmentation: samples of the base model lack the exactly flat colors of rendered scenes.
            logits = module(self.pixels(indices) + 0.06 * noise)
            # -1 labels the color of marked objects, which have no single one.
            losses = [
                F.cross_entropy(logits[name], targets[:, i], ignore_index=-1) for i, name in enumerate(models.HEADS)
            ]
            return torch.stack(losses).sum()

        return self.loop("classifier", module).run(loss)

    def clip(self) -> CLIPModel:
        """Train both CLIP towers with the contrastive loss (arXiv 2103.00020)."""
        tokenizer = self.tokenizer()
        module = models.build_clip(len(tokenizer))

        def loss(step: int) -> Tensor:
            indices = self.draw_indices("clip", step, NUM_SCENES)
            texts = self.captions(indices, step)
            out = module(input_ids=self.encode(tokenizer, texts), pixel_values=self.pixels(indices))
            # Short captions repeat within a batch of 96. Equal captions are all correct, so the target spreads over
            # them: `(B, B)`, rows summing to one, and symmetric, since equality is.
            ids = torch.tensor([texts.index(text) for text in texts], device=self.device)
            target = (ids[:, None] == ids[None]).float()
            target = target / target.sum(1, keepdim=True)
            logits = out.logits_per_text.float()
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2

        trained = self.loop("clip", module).run(loss)
        assert isinstance(trained, CLIPModel)
        return trained

    def clip_vision(self) -> CLIPModel:
        """Train CLIP's image tower further with its text tower locked (arXiv 2111.07991).

        The denoiser is conditioned on the text tower, which therefore stays frozen. Besides the captions of the batch,
        every picture is classified against all nouns and places.
        """
        tokenizer, clip = self.tokenizer(), self.clip()
        tower = nn.ModuleDict({"vision": clip.vision_model, "projection": clip.visual_projection})
        tower.requires_grad_(True)
        nouns = [f"a photo of a {noun}" for noun in CLASS_NOUNS]
        places = [f"a photo {PLACE_PHRASES[place][0]}" for place in PLACES]

        @torch.no_grad()
        def encode_texts(texts: list[str]) -> Tensor:
            pooled = clip.text_model(self.encode(tokenizer, texts)).pooler_output
            return F.normalize(clip.text_projection(pooled).float(), dim=1)

        def loss(step: int) -> Tensor:
            indices = self.draw_indices("clip_vision", step, NUM_VIEWS)
            rng = np.random.default_rng([33, step])
            # Odd steps train on views (nouns only), even steps on captioned scenes. Indices are drawn below
            # NUM_VIEWS and stretched to the larger number of scenes.
            is_view = step % 2 == 1
            rows = indices if is_view else indices * NUM_SCENES // NUM_VIEWS
            scenes = [
                view_of(VIEWS_SEED, int(i), num_views=VIEWS_EACH) if is_view else scene_of(SCENES_SEED, int(i))
                for i in rows
            ]
            source = self.views() if is_view else self.images
            pixels = models.to_pixel_values(torch.from_numpy(source[rows])).to(self.device)
            pixels = augment(pixels, step) + 0.05 * torch.randn(
                pixels.shape, generator=torch.Generator().manual_seed(step)
            ).to(self.device)
            if is_view:
                # Permuted color channels give objects colors outside the palette, so a noun is learned as a shape.
                pixels = pixels[:, rng.permutation(3)]
            pooled = tower["vision"](pixel_values=pixels).pooler_output
            # The temperature is frozen with the text tower.
            images = F.normalize(tower["projection"](pooled).float(), dim=1) * clip.logit_scale.exp()
            labels = torch.tensor([label_of(scene) for scene in scenes], device=self.device)
            by_noun = F.cross_entropy(images @ encode_texts(nouns).T, labels[:, 0])
            if is_view:
                return by_noun
            texts = [caption_scene(scene, rng) for scene in scenes]
            # Equal captions share a target, as in `clip`.
            same = torch.tensor([texts.index(text) for text in texts], device=self.device)
            target = (same[:, None] == same[None]).float()
            return (
                by_noun
                + F.cross_entropy(images @ encode_texts(texts).T, target / target.sum(1, keepdim=True))
                + F.cross_entropy(images @ encode_texts(places).T, labels[:, 2])
            )

        self.loop("clip_vision", tower).run(loss)
        return clip

    def views(self) -> np.ndarray:
        """Return uint8 `(NUM_VIEWS, 64, 64, 3)`; each VIEWS_EACH rows in a row show one object in other poses."""
        return load_or_render(self.work / "views.npy", seed=VIEWS_SEED, num=NUM_VIEWS, num_views=VIEWS_EACH)

    def dino(self) -> ViTModel:
        """Train the image encoder without captions: two views of one object agree (arXiv 2002.05709).

        A view is another drawing of the same object (other pose and place), with random crop, flip and brightness.
        """
        images = self.views()
        module = models.build_dino()
        # Projection head: only the loss sees its output; the exported embedding is its input.
        head = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
        both = nn.ModuleDict({"encoder": module, "head": head})

        def loss(step: int) -> Tensor:
            rng = np.random.default_rng([22, step])
            objects = self.draw_indices("dino", step, NUM_VIEWS // VIEWS_EACH)
            picks = np.stack([rng.permutation(VIEWS_EACH)[:2] for _ in objects])  # (B, 2): two different views
            embeddings = []
            for side in range(2):
                rows = objects * VIEWS_EACH + picks[:, side]
                pixels = models.to_pixel_values(torch.from_numpy(images[rows])).to(self.device)
                states = module(augment(pixels, step * 2 + side)).last_hidden_state[:, 0]
                embeddings.append(F.normalize(head(states).float(), dim=1))
            # Temperature 0.1. Negatives are the other objects' second views; `draw_indices` repeats no object.
            logits = embeddings[0] @ embeddings[1].T / 0.1
            target = torch.arange(len(objects), device=self.device)
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        self.loop("dino", both).run(loss)
        return module

    def vae(self) -> AutoencoderKL:
        """Train the autoencoder: reconstruction of pixels and of their gradients, with a small KL weight."""
        module = models.build_vae()

        def loss(step: int) -> Tensor:
            pixels = self.pixels(self.draw_indices("vae", step, NUM_SCENES))
            posterior = module.encode(pixels).latent_dist
            image = module.decode(posterior.sample()).sample.float()
            # `kl` sums over the 4 * 16 * 16 = 1024 latent elements: a weight of 1.6e-4 on their mean.
            divergence: Tensor = posterior.kl().mean()
            return reconstruction_loss(image, pixels) + 1e-5 * divergence / 1024 * 16

        trained = self.loop("vae", module).run(loss)
        assert isinstance(trained, AutoencoderKL)
        return trained

    def vae_decoder(self) -> AutoencoderKL:
        """Train the decoder further on cached posterior means.

        The encoder stays frozen: the denoiser is trained on its latents.
        """
        vae = self.vae()
        latents, _ = self.latents(vae)
        decoder = nn.ModuleDict({"decoder": vae.decoder, "post": vae.post_quant_conv})
        decoder.requires_grad_(True)

        def loss(step: int) -> Tensor:
            indices = self.draw_indices("vae_decoder", step, NUM_SCENES)
            pixels = self.pixels(indices)
            mean = latents[indices, 0].float().to(self.device)  # unscaled, as the decoder expects
            return reconstruction_loss(decoder["decoder"](decoder["post"](mean)).float(), pixels)

        self.loop("vae_decoder", decoder).run(loss)
        return vae

    @torch.no_grad()
    def latents(self, vae: AutoencoderKL) -> tuple[Tensor, float]:
        """Return posterior means and deviations ``(N, 2, 4, 16, 16)``, cached as float16, and the scaling factor."""
        path = self.work / "latents.npy"
        if not path.exists():
            rows = []
            for start in range(0, NUM_SCENES, 100):
                with torch.autocast(self.device.type, torch.bfloat16):
                    posterior = vae.encode(self.pixels(np.arange(start, start + 100))).latent_dist
                rows.append(torch.stack([posterior.mean, posterior.std], 1).half().cpu())
            np.save(path, torch.cat(rows).numpy())
        latents = torch.from_numpy(np.load(path))
        # As in Stable Diffusion, latents times the factor have unit variance; 2,000 scenes suffice to estimate it.
        return latents, 1.0 / float(latents[:2000, 0].float().std())

    def unet(self) -> UNet2DConditionModel:
        """Train the denoiser on cached latents; dropped captions make it usable with classifier-free guidance."""
        vae, clip, tokenizer = self.vae(), self.clip(), self.tokenizer()
        latents, scaling_factor = self.latents(vae)
        scheduler = models.build_noise_scheduler()
        alphas = scheduler.alphas_cumprod.to(self.device)
        module = models.build_unet()
        if self.device.type == "cpu":
            # torch's CPU flash attention has a slow backward pass in bfloat16 (measured: 0.93 against 0.55 s a step).
            module.set_attn_processor(AttnProcessor())

        def loss(step: int) -> Tensor:
            indices = self.draw_indices("unet", step, NUM_SCENES)
            # A CPU generator, so that noise and timesteps don't depend on the device.
            rng = torch.Generator().manual_seed(1_000_003 * step + 5)
            mean, std = latents[indices].float().unbind(1)  # (B, 2, 4, 16, 16) -> twice (B, 4, 16, 16)
            clean = (mean + std * torch.randn(mean.shape, generator=rng)) * scaling_factor
            noise = torch.randn(clean.shape, generator=rng).to(self.device)
            clean = clean.to(self.device)
            timesteps = torch.randint(0, 1000, (len(clean),), generator=rng).to(self.device)
            texts = self.captions(indices, step)
            drop = torch.rand(len(texts), generator=rng) < CAPTION_DROPOUT
            texts = ["" if d else text for d, text in zip(drop.tolist(), texts, strict=True)]
            with torch.no_grad():
                states = clip.text_model(self.encode(tokenizer, texts)).last_hidden_state
            # v-prediction (arXiv 2202.00512): v = sqrt(a) * noise - sqrt(1 - a) * clean, with a = alphas_cumprod.
            signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
            spread = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
            noisy = signal * clean + spread * noise
            target = signal * noise - spread * clean
            predicted = module(noisy, timesteps, states).sample.float()
            return F.mse_loss(predicted, target)

        trained = self.loop("unet", module).run(loss)
        assert isinstance(trained, UNet2DConditionModel)
        return trained


def reconstruction_loss(image: Tensor, pixels: Tensor) -> Tensor:
    """Return L1 + 2 * MSE of pixels, plus L1 of differences between neighbors, which keeps outlines sharp."""
    error = (image - pixels).abs().mean() + 2 * F.mse_loss(image, pixels)
    for dim in (2, 3):
        error = error + 0.5 * (image.diff(dim=dim) - pixels.diff(dim=dim)).abs().mean()
    return error


def augment(pixels: Tensor, seed: int) -> Tensor:
    """Crop, flip and scale the brightness of each picture at random; ``(B, 3, 64, 64)`` in and out."""
    rng = torch.Generator().manual_seed(seed)
    num = len(pixels)
    # In affine_grid's coordinates a picture spans [-1, 1]: a crop of half width `scale` stays inside for |shift| up
    # to 1 - scale.
    scale = 0.8 + 0.2 * torch.rand(num, generator=rng)
    shift = (torch.rand(num, 2, generator=rng) * 2 - 1) * (1 - scale)[:, None]
    mirror = torch.where(torch.rand(num, generator=rng) < 0.5, -1.0, 1.0)
    zero = torch.zeros(num)
    # (B, 2, 3): maps output coordinates to input coordinates; a negative x scale flips.
    theta = torch.stack(
        [torch.stack([scale * mirror, zero, shift[:, 0]], 1), torch.stack([zero, scale, shift[:, 1]], 1)],
        1,
    ).to(pixels.device)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    crops = F.grid_sample(pixels, grid, align_corners=False, padding_mode="reflection")
    gain = 0.9 + 0.2 * torch.rand(num, 1, 1, 1, generator=rng)
    return (crops * gain.to(pixels.device)).clamp(-1, 1)
