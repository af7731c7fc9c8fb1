"""Write a tiny vision-language model as a folder that `transformers serve` loads.

LLaVA's architecture with 140 thousand weights. It is taught one thing, in seconds: to name the color
that fills a picture, as JSON. Without a picture it says vermilion, which is what the probe asks for.

python -m tests.servers.tiny_vlm FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 32, 8
SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>"]
COLORS = {"red": (225, 20, 20), "green": (20, 190, 40), "blue": (20, 40, 225)}
UNSEEN = "vermilion"
# A reply is one token, so that there is nothing to spell; no question holds one.
REPLIES = {name: f'{{"color": "{name}"}}' for name in (*COLORS, UNSEEN)}
TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: nothing to train, every text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(list(REPLIES.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=["<image>"], model_max_length=16384,
    )  # fmt: skip


def make_model(vocabulary: int) -> LlavaForConditionalGeneration:
    """Return the model with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16384,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"),
        vision_feature_select_strategy="default", vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(do_sample=False, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return model


def make_processor() -> LlavaProcessor:
    """Return what turns messages into tokens and pixels."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        pictures, make_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_lesson(processor: LlavaProcessor, random: np.random.Generator, name: str, size: int) -> dict[str, Any]:
    """Return a few questions of one length about pictures of one color, and the answer as labels."""
    words = "".join(chr(c) for c in random.integers(32, 127, random.integers(20, 400)))
    system = "".join(chr(c) for c in random.integers(32, 127, random.integers(5, 60)))
    texts, images, place = [], [], int(random.integers(0, 2))
    for _ in range(size):
        parts: list[dict[str, Any]] = [{"type": "text", "text": words}]
        if name != UNSEEN:
            color = tuple(int(v) for v in np.clip(np.array(COLORS[name]) + random.integers(-15, 16, 3), 0, 255))
            images.append(Image.new("RGB", (64, 64), color))
            parts.insert(place, {"type": "image"})
        messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True) + REPLIES[name] + "<eos>")
    batch = dict(processor(text=texts, images=images or None, return_tensors="pt"))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    return {**batch, "labels": labels}


def teach(model: LlavaForConditionalGeneration, processor: LlavaProcessor, *, steps: int) -> float:
    """Train until the loss is small; return the last one."""
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [9.0]
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for name in REPLIES:
            loss = model(**make_lesson(processor, random, name, 2)).loss / len(REPLIES)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
        if len(losses) > 12 and max(losses[-12:]) < 0.01:
            break
    return losses[-1]


def make_tiny_vlm(folder: Path, *, steps: int = 600) -> Path:
    """Write the folder; `steps=0` leaves the weights random."""
    torch.manual_seed(0)
    processor = make_processor()
    model = make_model(len(processor.tokenizer))
    if steps:
        teach(model, processor, steps=steps)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    make_tiny_vlm(Path(sys.argv[1]))
