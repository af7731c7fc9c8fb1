"""What may stand in a caption: a short plain phrase that says nothing of what never changes.

Captions that repeat a subject's fixed traits bind them to the words instead of the identifier token:
the model then draws a stranger unless the traits are spelled out.
"""

import re
import unicodedata
from collections.abc import Iterable

# Words too common to tell a trait by.
COMMON = frozenset(
    ("a", "all", "and", "are", "at", "back", "big", "body", "both", "bottom", "by", "color", "colored", "colour",
     "for", "from", "front", "has", "have", "in", "is", "its", "large", "left", "little", "long", "on", "one",
     "part", "parts", "photo", "photos", "right", "same", "shape", "short", "side", "small", "subject", "the",
     "top", "two", "very", "with")
)  # fmt: skip


def clean_phrase(text: str, *, max_words: int = 12) -> str:
    """Return a model's text as a plain short phrase: data that can't act as anything else."""
    kept = "".join(c if unicodedata.category(c)[0] in "LNZ" or c in " ,.'-" else " " for c in text)
    words = kept.split()[:max_words]
    return " ".join(words).strip(" .,")


def list_trait_words(traits: Iterable[str], *, class_noun: str) -> set[str]:
    """Return the words that captions must not say: those of the traits, less common ones and the class noun."""
    words = {word for trait in traits for word in re.findall(r"[a-z]{3,}", trait.lower())}
    return words - COMMON - set(re.findall(r"[a-z]+", class_noun.lower()))


def find_leaks(phrase: str, trait_words: set[str]) -> list[str]:
    """Return the trait words in a phrase, plurals included."""
    said = re.findall(r"[a-z]+", phrase.lower())
    return sorted({word for word in said if word in trait_words or word.removesuffix("s") in trait_words})
