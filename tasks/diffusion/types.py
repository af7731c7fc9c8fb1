"""Data types at the interface of model families, importable without torch.

A family's adapter owns loading, prompt and image encoding, noising, target, prediction, saving and sampling.
No other module depends on its architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents in the denoiser's scale; each `(B, C, h, w)`."""

    mean: "Tensor"
    std: "Tensor"


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings: hidden states `(B, L, D)` and, in most families, pooled embeddings `(B, P)`."""

    encoder_hidden_states: "Tensor"
    pooled_prompt_embeds: "Tensor | None" = None

    def take(self, rows: "Tensor") -> "Conditioning":
        """Gather rows by index `(N,)`; an index may repeat."""
        pooled = None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds[rows]
        return Conditioning(self.encoder_hidden_states[rows], pooled)


@dataclass(frozen=True)
class SamplingRequest:
    """One image to sample."""

    prompt: str
    seed: int
    negative_prompt: str = ""


OnStep = Callable[[int, int], None]
"""Called after each denoising step with the steps done and their number."""
