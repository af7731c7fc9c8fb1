"""Which prompts are refused: lists of words, and rules that combine them.

A word list stops accidents and plain requests. It doesn't understand language, so it is no substitute for a
classifier of pictures where strangers write prompts.
"""

import hashlib
import os
import re
import unicodedata
from functools import cache, cached_property
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tasks.errors import ConfigError, first_line

VARIABLE = "LIKENESS_PROMPT_POLICY"
SHIPPED = Path(__file__).with_name("prompt_policy.yaml")
# What stands for a letter in disguised words.
DISGUISES = str.maketrans({"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "@": "a", "$": "s", "!": "i"})
# Cyrillic and Greek letters that look like Latin ones.
LOOKALIKES = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0455\u03bf\u03b1", "aeopcyxisoa")
FILLERS = "\u115f\u1160\u3164\uffa0"
MAX_SEGMENTS = 16
"""Parts of a word, separated by invisible characters, that are read together."""

Lists = list[str | list[str]]
"""Names of lists that must all match; of a list within, one."""


class PromptRefused(ConfigError):
    """The policy refuses a prompt."""

    def __init__(self, rule: str, *, prompt: str) -> None:
        super().__init__(f"the prompt is refused: {rule}; {VARIABLE} names the policy")
        self.rule = rule
        self.prompt_sha256 = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        """In place of the text, which is kept nowhere."""


class NegativeRule(BaseModel):
    """Lists that the negative prompt must match, and those that the prompt must match."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    negative_prompt: Lists
    prompt: Lists


class PromptPolicy(BaseModel):
    """Lists of words and patterns, and rules that combine them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: dict[str, list[str]] = {}
    patterns: dict[str, list[str]] = {}
    exceptions: dict[str, list[str]] = {}
    guards: list[str] = []
    rules: dict[str, Lists] = {}
    negative_rules: dict[str, NegativeRule] = {}

    @model_validator(mode="after")
    def check_rules(self) -> "PromptPolicy":
        """Refuse a rule that could never match, or always would, and an invalid pattern."""
        sides: list[tuple[str, Lists]] = list(self.rules.items())
        sides += [("guards", [guard]) for guard in self.guards]
        for name, rule in self.negative_rules.items():
            sides += [(name, rule.negative_prompt), (name, rule.prompt)]
        for name, lists in sides:
            named = [one for group in lists for one in (group if isinstance(group, list) else [group])]
            unknown = [one for one in named if not self.words.get(one) and not self.patterns.get(one)]
            if unknown or not lists or [] in lists:
                raise ValueError(f"rule {name!r} needs lists with words{': ' + unknown[0] if unknown else ''}")
        for pattern in [one for group in (self.patterns, self.exceptions) for found in group.values() for one in found]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is invalid: {error}") from error
        return self

    @cached_property
    def compiled(self) -> dict[str, re.Pattern[str]]:
        """One expression per list, of whole words."""
        names = {**self.words, **self.patterns}
        return {name: join([*map(inflect, self.words.get(name, [])), *self.patterns.get(name, [])]) for name in names}

    @cached_property
    def compiled_exceptions(self) -> dict[str, re.Pattern[str]]:
        """One expression per list, of phrases that it does not mean."""
        return {name: join(patterns) for name, patterns in self.exceptions.items() if patterns}

    def find_rule(self, prompt: str, *, negative_prompt: str = "") -> str | None:
        """Return the first rule that a prompt matches, alone or with its negative prompt."""
        texts = list_readings(prompt)
        for name, lists in self.rules.items():
            if self.matches(texts, lists):
                return name
        negatives = list_readings(negative_prompt) if negative_prompt else []
        for name, rule in self.negative_rules.items():
            if self.matches(negatives, rule.negative_prompt) and self.matches(texts, rule.prompt):
                return name
        return None

    def matches(self, texts: list[str], lists: Lists) -> bool:
        """Return whether each list, or one of each group of lists, matches a reading of a text."""
        groups = [group if isinstance(group, list) else [group] for group in lists]
        return all(any(self.contains(text, name) for name in group for text in texts) for group in groups)

    def contains(self, text: str, name: str) -> bool:
        """Return whether a text has a word of a list, outside the list's exceptions."""
        exceptions = self.compiled_exceptions.get(name)
        if exceptions is not None:
            text = exceptions.sub(lambda found: found[0] if self.is_guarded(found) else " ", text)
        return self.compiled[name].search(text) is not None

    def is_guarded(self, found: re.Match[str]) -> bool:
        """Return whether a person follows an exception, as in `naked cat woman`, so that it does not hold."""
        return any(self.compiled[name].match(found.string, found.end()) for name in self.guards)


def join(patterns: list[str]) -> re.Pattern[str]:
    """Return an expression of whole words that matches one of the patterns, with the space before it."""
    return re.compile(f" (?:{'|'.join(f'(?:{one})' for one in patterns)})(?= )")


def inflect(word: str) -> str:
    """Return a pattern of a word and its plural."""
    plain = fold(word, is_undisguised=False)
    stem = re.escape(plain)
    for ending, plural in (("y", "ies"), ("fe", "ves"), ("f", "ves")):
        if plain.endswith(ending):
            return f"{stem}(?:s|es)?|{re.escape(plain.removesuffix(ending))}{plural}"
    return f"{stem}(?:s|es)?"


def list_readings(text: str) -> list[str]:
    """Return how a text can be read, without accents and between spaces.

    Digits may stand for letters or numbers, invisible characters may hide within words or join them, and letters
    may be spaced out.
    """
    plain = unicodedata.normalize("NFKD", text).casefold().translate(LOOKALIKES)
    # NUL marks invisible characters; combining ones are accents.
    marked = "".join("\0" if is_invisible(c) else c for c in plain if not unicodedata.combining(c))
    joined = [
        "".join(segments[first:last])
        for segments in (chunk.split("\0") for chunk in marked.split() if "\0" in chunk)
        for first in range(len(segments))
        for last in range(first + 2, min(first + MAX_SEGMENTS, len(segments)) + 1)
    ]
    readings = []
    for reading in (marked.replace("\0", ""), marked.replace("\0", " "), " ".join(joined)):
        for is_undisguised in (True, False):
            words = fold(reading, is_undisguised=is_undisguised)
            spelled = re.sub(r"\b\w(?: \w\b){2,}", lambda found: found[0].replace(" ", ""), words)
            readings += [f" {words} ", f" {spelled} "]
    return list(dict.fromkeys(readings))


def is_invisible(char: str) -> bool:
    """Return whether a character is not drawn: a format character, variation selector or filler."""
    return unicodedata.category(char) in ("Cf", "Mn") or char in FILLERS


def fold(text: str, *, is_undisguised: bool) -> str:
    """Return a text's words in lower case, separated by a space; undisguised: with letters for digits and signs."""
    words = re.findall(r"[^\W_]+(?:[@$!][^\W_]*)*|[@$!][^\W_]+", text.casefold())
    if is_undisguised:
        # Digits stand for letters only beside letters: the 4 of "4 people" stays.
        words = [w.rstrip("!").translate(DISGUISES) if re.search(r"[^\W\d_]", w) else w for w in words]
    return " ".join(words)


def read_policy() -> PromptPolicy:
    """Return the policy in force. Raises ConfigError for a file that is none."""
    return load_policy(os.environ.get(VARIABLE) or str(SHIPPED))


@cache
def load_policy(path: str) -> PromptPolicy:
    """Return the policy of a file. Raises ConfigError."""
    try:
        return PromptPolicy.model_validate(yaml.safe_load(Path(path).read_text()) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{VARIABLE}: {path} cannot be read: {first_line(error)}") from error
    except ValidationError as error:
        raise ConfigError(f"{VARIABLE}: {path} is no prompt policy: {error.errors()[0]['msg']}") from error


def check_prompt(prompt: str, *, negative_prompt: str = "", subject: tuple[str, str] | None = None) -> None:
    """Raise PromptRefused for a prompt that the policy refuses; the message does not repeat it.

    `subject`: identifier token and class noun. The prompt is read with the noun in the token's place.
    """
    policy, texts = read_policy(), [prompt]
    if subject is not None and subject[0]:
        token, noun = subject
        read = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", lambda _: noun, prompt, flags=re.IGNORECASE)
        # A token that is itself a listed word, such as `woman`, keeps its meaning too.
        is_listed = any(policy.contains(f" {fold(token, is_undisguised=True)} ", name) for name in policy.compiled)
        texts = [read, prompt] if is_listed else [read]
    rules = (policy.find_rule(text, negative_prompt=negative_prompt) for text in texts)
    rule = next((found for found in rules if found is not None), None)
    if rule is not None:
        raise PromptRefused(rule, prompt=prompt)
