"""What a model family offers, and how the configured one is opened.

A family is one adapter file: it owns loading, prompt and image encoding, noising, target,
prediction, saving and sampling. Nothing else knows its architecture.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents, already scaled; each `(B, C, h, w)`."""

    mean: "Tensor"
    std: "Tensor"


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of prompts: states `(B, L, D)` and, in most families, one pooled row `(B, P)`."""

    encoder_hidden_states: "Tensor"
    pooled_prompt_embeds: "Tensor | None" = None

    def take(self, rows: "Tensor") -> "Conditioning":
        """Return the conditioning of the given rows."""
        pooled = None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds[rows]
        return Conditioning(self.encoder_hidden_states[rows], pooled)


@dataclass(frozen=True)
class SamplingRequest:
    """One picture to draw."""

    prompt: str
    seed: int
