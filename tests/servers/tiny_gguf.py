"""Write a tiny llama with random weights and a vocabulary of bytes as GGUF, by the format's description.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

python -m tests.servers.tiny_gguf FILE
"""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, INNER, CONTEXT, ALIGNMENT = 32, 2, 2, 64, 4096, 32
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def pack(kind: int, value: Any) -> bytes:
    """Return a value without its type."""
    if kind == STRING:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(pack(inner, item) for item in items)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f"}[kind], value)


def list_facts() -> dict[str, tuple[int, Any]]:
    """Return what the file says of the model and its tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, NORMAL]
    return {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, "tiny-random"),
        "llama.context_length": (UINT32, CONTEXT),
        "llama.embedding_length": (UINT32, HIDDEN),
        "llama.block_count": (UINT32, LAYERS),
        "llama.feed_forward_length": (UINT32, INNER),
        "llama.attention.head_count": (UINT32, HEADS),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "llama.rope.dimension_count": (UINT32, HIDDEN // HEADS),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, [0.0] * len(tokens))),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds)),
        "tokenizer.ggml.unknown_token_id": (UINT32, 0),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }


def make_weights(vocabulary: int) -> dict[str, "np.ndarray[Any, Any]"]:
    """Return random weights by name."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocabulary, HIDDEN), "output": (vocabulary, HIDDEN), "output_norm": (HIDDEN,)
    }  # fmt: skip
    for layer in range(LAYERS):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
        parts = {**square, "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (HIDDEN,))
        shapes.update({f"blk.{layer}.{name}": shape for name, shape in {**parts, **norms}.items()})
    return {
        f"{name}.weight": np.ones(shape, np.float32)
        if name.endswith("norm")
        else random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_tiny_gguf(path: Path) -> Path:
    """Write the file: llama's architecture, 33 thousand weights."""
    facts = list_facts()
    weights = make_weights(len(facts["tokenizer.ggml.tokens"][1][1]))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(weights), len(facts))
    for name, (kind, value) in facts.items():
        head += pack(STRING, name) + struct.pack("<I", kind) + pack(kind, value)
    data = b""
    for name, array in weights.items():
        sides = array.shape[::-1]  # the fastest first
        head += pack(STRING, name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, 0, len(data))
        data += array.tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)
    return path


if __name__ == "__main__":
    make_tiny_gguf(Path(sys.argv[1]))
