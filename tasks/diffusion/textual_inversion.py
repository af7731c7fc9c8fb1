"""Textual inversion (arXiv 2208.01618): trainable embeddings of new tokens beside a frozen embedding table.

A token of several vectors has placeholders as in diffusers: `<sks>`, `<sks>_1`, ... Prompts keep the plain
identifier token, which is replaced by the placeholders before tokenization.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tasks.errors import ConfigError
from tasks.stage.tensor_files import save_tensors

EMBEDS_FILE = "learned_embeds.safetensors"
# Tensor names that other tools expect where a model has several text encoders.
EMBEDS_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class LearnedEmbedding(nn.Module):
    """An embedding table of frozen rows, followed by trainable ones.

    Gradients reach the new rows alone, without masking; they stay in float32 whatever the table's dtype.
    """

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors.detach().clone().to(table.weight.device, torch.float32))

    @property
    def weight(self) -> Tensor:
        """The frozen rows, under the name that `nn.Embedding` has."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return embeddings `(..., L, D)` of ids `(..., L)`; ids past the table are learned vectors."""
        first = self.table.num_embeddings
        # Both lookups see all ids, clamped into range, and `where` selects: no data-dependent shapes.
        known: Tensor = self.table(input_ids.clamp_max(first - 1))
        learned = self.vectors[(input_ids - first).clamp_min(0)].to(known.dtype)
        return torch.where((input_ids >= first)[..., None], learned, known)  # (..., L, 1) against (..., L, D)


def placeholder_tokens(identifier_token: str, num_vectors: int) -> list[str]:
    """Return the placeholder tokens of an identifier token, one per vector."""
    return [f"<{identifier_token}>", *(f"<{identifier_token}>_{i}" for i in range(1, num_vectors))]


def add_placeholder_tokens(tokenizer: Any, text_encoder: Any, names: list[str], *, vectors: Tensor) -> LearnedEmbedding:
    """Add tokens with the embeddings `(V, D)` to a tokenizer and its text encoder.

    Raises:
        ConfigError: a name is taken, or vocabulary and embedding table differ in size.

    """
    table = text_encoder.get_input_embeddings()
    if tokenizer.add_tokens(names) != len(names):
        raise ConfigError(
            f"the tokenizer already knows one of {', '.join(names)}; choose another subject.identifier_token"
        )
    # `LearnedEmbedding` takes ids from `num_embeddings` on as its own rows.
    ids = tokenizer.convert_tokens_to_ids(names)
    if ids != list(range(table.num_embeddings, table.num_embeddings + len(names))):
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens for {table.num_embeddings} embeddings")
    # With the legacy `eos_token_id` of 2, CLIP pools at the position of the largest id, which a new token would have.
    for holder in (text_encoder.config, text_encoder, getattr(text_encoder, "text_model", None)):
        if holder is not None and hasattr(holder, "eos_token_id"):
            holder.eos_token_id = tokenizer.eos_token_id
    learned = LearnedEmbedding(table, vectors)
    text_encoder.set_input_embeddings(learned)
    return learned


def initial_vectors(tokenizer: Any, text_encoder: Any, words: str, *, num_vectors: int) -> Tensor:
    """Return the embeddings `(V, D)`, float32, of the tokens of `words`, repeated or cut to V.

    Raises:
        ConfigError: the words have no tokens.

    """
    ids = tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"{words!r} has no tokens to begin from; set training.textual_inversion.initializer_token")
    table = text_encoder.get_input_embeddings().weight
    rows = [ids[i % len(ids)] for i in range(num_vectors)]
    vectors: Tensor = table[rows].detach().float().clone()
    return vectors


def write_prompt(prompt: str, identifier_token: str, names: list[str]) -> str:
    """Replace the identifier token by its placeholders, at word boundaries only."""
    # `\b` would not match beside an identifier that begins or ends with a symbol.
    return re.sub(rf"(?<!\w){re.escape(identifier_token)}(?!\w)", " ".join(names), prompt)


def save_tokens(folder: Path, identifier_token: str, vectors: Mapping[str, Tensor]) -> Path:
    """Write embeddings in the format of `load_textual_inversion`: keyed by the token, or by encoder if several."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in vectors.items()}
    token = f"<{identifier_token}>"
    tensors = (
        {token: plain["text_encoder"]}
        if set(plain) == {"text_encoder"}
        else {EMBEDS_KEYS[name]: tensor for name, tensor in plain.items()}
    )
    path = folder / EMBEDS_FILE
    save_tensors(tensors, path, metadata={"token": token, "identifier_token": identifier_token})
    return path


def load_tokens(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the identifier token and its embeddings `(V, D)` by text encoder."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    # The only tensor of a model with one text encoder is keyed by the token itself.
    by_long_name = {long: name for name, long in EMBEDS_KEYS.items()}
    return metadata["identifier_token"], {by_long_name.get(key, "text_encoder"): t for key, t in tensors.items()}
