"""Caption linting: short plain phrases that name no invariant trait of the subject.

Captions that repeat invariant traits bind them to these words instead of the identifier token: prompts would then
have to spell them out.
"""

import re
import unicodedata
from collections.abc import Iterable

# Words too common to identify a trait.
COMMON = frozenset(
    ("a", "all", "and", "are", "at", "back", "big", "body", "both", "bottom", "by", "color", "colored", "colour",
     "for", "from", "front", "has", "have", "in", "is", "its", "large", "left", "little", "long", "on", "one",
     "part", "parts", "photo", "photos", "right", "same", "shape", "short", "side", "small", "subject", "the",
     "top", "two", "very", "with")
)  # fmt: skip


# Identifier tokens of popular tutorials and scripts: in a caption they would compete with the configured one.
RARE_TOKENS = frozenset(
    ("sks", "ohwx", "zwx", "zwz", "xyz", "shs", "olis", "pdx", "uhj", "ukj", "cjw", "hta", "bnha", "rkx", "xjy", "wlm")
)  # fmt: skip
# Nouns that are subjects themselves: a caption with one describes another subject, or renames this one.
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
MAX_CHARACTERS_PER_WORD = 12


def clean_phrase(text: str, *, max_words: int = 12) -> str:
    """Return a model's text as a plain short phrase, safe to insert into prompts, logs and HTML.

    NFKC-normalized, letters, digits, spaces and `,.'-` only, at most `max_words` words and 12 x `max_words` characters.
    """
    limit = MAX_CHARACTERS_PER_WORD * max_words
    # Cut first: normalization of an unbounded reply is expensive.
    plain = unicodedata.normalize("NFKC", text[: 20 * limit])
    # Format characters (Cf): zero-width and bidirectional controls, removed without a gap.
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    kept = "".join(c if unicodedata.category(c)[0] in "LNZ" or c in " ,.'-" else " " for c in plain)
    words = kept.split()[:max_words]
    while words and len(" ".join(words)) > limit:
        words.pop()
    return " ".join(words).strip(" .,")


def clean_caption(text: str, *, identifier_token: str) -> str:
    """Return a captioner's phrase without foreign identifier tokens and words of mixed scripts."""
    words = clean_phrase(text).split()
    kept = [word for word in words if not is_foreign_token(word, identifier_token) and not is_mixed(word)]
    return " ".join(kept).strip(" .,")


def is_foreign_token(word: str, identifier_token: str) -> bool:
    """Whether a word looks like another subject's identifier token: known, with inner digits, or unpronounceable."""
    bare = word.strip(".,'-").lower()
    if bare == identifier_token.lower():
        return False  # `without_name` removes the subject's own token
    if bare in RARE_TOKENS:
        return True
    letters = re.sub(r"[^a-z]", "", bare)
    has_digit_inside = bool(re.fullmatch(r"[a-z]+\d+[a-z\d]*", bare))
    # Most rare tokens of DreamBooth scripts have no vowel, such as sks, rkx or xjy.
    is_unpronounceable = (
        bare.isascii() and bare.isalpha() and 3 <= len(bare) <= 6 and not re.search("[aeiouy]", letters)
    )
    return has_digit_inside or is_unpronounceable


def is_mixed(word: str) -> bool:
    """Whether a word mixes scripts, as homoglyph spoofs of Latin words do."""
    scripts = {unicodedata.name(char, "?").split()[0] for char in word if char.isalpha()}
    return len(scripts & {"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"}) > 1


def find_foreign_nouns(phrase: str, *, class_noun: str) -> list[str]:
    """Return the subject nouns in a phrase, singular, other than the class noun's own."""
    own = {to_singular(word) for word in re.findall(r"[a-z]+", class_noun.lower())}
    said = {to_singular(word) for word in re.findall(r"[a-z]+", phrase.lower())}
    return sorted((said & SUBJECT_NOUNS) - own)


def to_singular(word: str) -> str:
    """Return an approximate English singular; both sides of a comparison go through it."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def list_forms(noun: str) -> list[str]:
    """Return a noun with its possible plurals, longest first, so that a regex alternation prefers them."""
    plurals = [noun + "s", noun + "es", *(plural for plural, single in IRREGULAR.items() if single == noun.lower())]
    if noun.endswith("y"):
        plurals.append(noun[:-1] + "ies")
    return sorted({noun, *plurals}, key=len, reverse=True)


def list_trait_words(traits: Iterable[str], *, class_noun: str) -> set[str]:
    """Return the words that captions must not contain: those of the traits, less common words and the class noun."""
    words = {word for trait in traits for word in re.findall(r"[a-z]{3,}", trait.lower())}
    return words - COMMON - set(re.findall(r"[a-z]+", class_noun.lower()))


def find_leaks(phrase: str, trait_words: set[str]) -> list[str]:
    """Return the words of a phrase that are trait words or their plurals."""
    said = re.findall(r"[a-z]+", phrase.lower())
    return sorted({word for word in said if word in trait_words or word.removesuffix("s") in trait_words})
