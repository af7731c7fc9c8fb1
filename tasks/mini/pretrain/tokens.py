"""The mini world's CLIP tokenizer: byte-level BPE with one token per word, and spare rare tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer

MAX_LENGTH = 32
# Identifier tokens: words with a token of their own that occur in no caption of the world.
RARE_TOKENS = ("sks", "zwx", "ohwx", "qyv", "xjy", "vkz", "bnha", "olis")
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Return a vocabulary and merges that encode every given word as one token.

    Every byte is a token too, so that any text can be encoded.
    """
    model = BPE(end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    alphabet = sorted(ByteLevel.alphabet())
    # The limit is never reached and one occurrence suffices, so merging continues until every word is one token.
    trainer = BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(words)), trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # The order of OpenAI's CLIP: bytes, bytes that end a word, merges, special tokens.
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [merged for merged in (m.replace(" ", "") for m in merges) if merged not in tokens]
    tokens += SPECIAL
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def write_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Write the files that ``CLIPTokenizer.from_pretrained`` reads."""
    vocabulary, merges = build_vocabulary([*words, *RARE_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")  # readers skip the first line
    start, end = SPECIAL
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
