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


# Tokens that tutorials and scripts bind subjects to: in a caption they would bind this one to somebody else's.
RARE_TOKENS = frozenset(
    ("sks", "ohwx", "zwx", "zwz", "xyz", "shs", "olis", "pdx", "uhj", "ukj", "cjw", "hta", "bnha", "rkx", "xjy", "wlm")
)  # fmt: skip
# Subjects of their own: a caption that names one tells of another subject, or calls this one something else.
SUBJECT_NOUNS = frozenset(
    ("animal", "baby", "bear", "bird", "boy", "bunny", "calf", "cat", "chicken", "child", "cow", "dog", "duck",
     "elephant", "figurine", "fish", "fox", "frog", "girl", "goat", "goose", "hamster", "horse", "kitten", "lamb",
     "lion", "lizard", "man", "monkey", "mouse", "owl", "panda", "parrot", "penguin", "person", "pig", "plushie",
     "pony", "puppy", "rabbit", "robot", "sheep", "snake", "squirrel", "tiger", "turtle", "wolf", "woman")
)  # fmt: skip
IRREGULAR = {
    "calves": "calf", "children": "child", "geese": "goose", "men": "man", "mice": "mouse", "people": "person",
    "wolves": "wolf", "women": "woman",
}  # fmt: skip
MOST_CHARACTERS_PER_WORD = 12


def clean_phrase(text: str, *, max_words: int = 12) -> str:
    """Return a model's text as a plain short phrase: data that can't act as anything else.

    NFKC-normalized, without invisible characters, at most `max_words` words and 12 characters for each.
    """
    limit = MOST_CHARACTERS_PER_WORD * max_words
    plain = unicodedata.normalize("NFKC", text[: 20 * limit])
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    kept = "".join(c if unicodedata.category(c)[0] in "LNZ" or c in " ,.'-" else " " for c in plain)
    words = kept.split()[:max_words]
    while words and len(" ".join(words)) > limit:
        words.pop()
    return " ".join(words).strip(" .,")


def clean_caption(text: str, *, identifier_token: str) -> str:
    """Return a captioner's phrase without identifier tokens of other subjects and words of mixed scripts."""
    words = clean_phrase(text).split()
    kept = [word for word in words if not is_foreign_token(word, identifier_token) and not is_mixed(word)]
    return " ".join(kept).strip(" .,")


def is_foreign_token(word: str, identifier_token: str) -> bool:
    """Whether a word looks like another subject's identifier token: a known one, or no pronounceable word."""
    bare = word.strip(".,'-").lower()
    if bare == identifier_token.lower():
        return False  # where the subject's own name stands, the prompt decides
    if bare in RARE_TOKENS:
        return True
    letters = re.sub(r"[^a-z]", "", bare)
    has_digit_inside = bool(re.fullmatch(r"[a-z]+\d+[a-z\d]*", bare))
    is_unpronounceable = (
        bare.isascii() and bare.isalpha() and 3 <= len(bare) <= 6 and not re.search("[aeiouy]", letters)
    )
    return has_digit_inside or is_unpronounceable


def is_mixed(word: str) -> bool:
    """Whether a word's letters are of several scripts, as look-alikes of Latin words are."""
    scripts = {unicodedata.name(char, "?").split()[0] for char in word if char.isalpha()}
    return len(scripts & {"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"}) > 1


def find_foreign_nouns(phrase: str, *, class_noun: str) -> list[str]:
    """Return the subjects that a phrase names beside the one that is shown, plural forms included."""
    own = {to_singular(word) for word in re.findall(r"[a-z]+", class_noun.lower())}
    said = {to_singular(word) for word in re.findall(r"[a-z]+", phrase.lower())}
    return sorted((said & SUBJECT_NOUNS) - own)


def to_singular(word: str) -> str:
    """Return an English noun's singular, for comparison."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def list_forms(noun: str) -> list[str]:
    """Return a noun with its plural forms, longest first."""
    plurals = [noun + "s", noun + "es", *(plural for plural, single in IRREGULAR.items() if single == noun.lower())]
    if noun.endswith("y"):
        plurals.append(noun[:-1] + "ies")
    return sorted({noun, *plurals}, key=len, reverse=True)


def list_trait_words(traits: Iterable[str], *, class_noun: str) -> set[str]:
    """Return the words that captions must not say: those of the traits, less common ones and the class noun."""
    words = {word for trait in traits for word in re.findall(r"[a-z]{3,}", trait.lower())}
    return words - COMMON - set(re.findall(r"[a-z]+", class_noun.lower()))


def find_leaks(phrase: str, trait_words: set[str]) -> list[str]:
    """Return the trait words in a phrase, plurals included."""
    said = re.findall(r"[a-z]+", phrase.lower())
    return sorted({word for word in said if word in trait_words or word.removesuffix("s") in trait_words})
