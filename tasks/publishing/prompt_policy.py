"""Which prompts are refused: lists of words, and rules that combine them.

A word list stops accidents and plain requests. It doesn't understand language, so it is no substitute for a
classifier of pictures where strangers write prompts.
"""

import os
import re
import unicodedata
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tasks.errors import ConfigError, first_line

VARIABLE = "LIKENESS_PROMPT_POLICY"
SHIPPED = Path(__file__).with_name("prompt_policy.yaml")
# What stands for a letter in disguised words.
DISGUISES = str.maketrans({"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "@": "a", "$": "s", "!": "i"})


class PromptPolicy(BaseModel):
    """Word lists, and rules that name the lists which must all match."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: dict[str, list[str]] = {}
    rules: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def check_rules(self) -> "PromptPolicy":
        """Refuse a rule that could never match, or always would."""
        for rule, lists in self.rules.items():
            unknown = [name for name in lists if not self.words.get(name)]
            if unknown or not lists:
                raise ValueError(f"rule {rule!r} needs lists with words{': ' + unknown[0] if unknown else ''}")
        return self

    def find_rule(self, text: str) -> str | None:
        """Return the first rule that a text matches."""
        folded = fold(text)
        for rule, lists in self.rules.items():
            if all(any(contains(folded, word) for word in self.words[name]) for name in lists):
                return rule
        return None


def fold(text: str) -> str:
    """Return a text in lower case, words apart by a space, without accents, disguises and invisible characters."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    kept = "".join(c for c in plain if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    words = re.findall(r"[^\W_]+(?:[@$!][^\W_]*)*|[@$!][^\W_]+", kept)
    # Digits stand for letters only beside letters: the 4 of "4 people" stays.
    spoken = [w.rstrip("!").translate(DISGUISES) if re.search(r"[^\W\d_]", w) else w for w in words]
    return f" {' '.join(spoken)} "


def contains(folded: str, word: str) -> bool:
    """Return whether a folded text has a word, or its plural."""
    plain = fold(word).strip()
    return any(f" {plain}{ending} " in folded for ending in ("", "s", "es"))


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


def check_prompt(prompt: str) -> None:
    """Raise ConfigError for a prompt that the policy refuses; the message does not repeat it."""
    rule = read_policy().find_rule(prompt)
    if rule is not None:
        raise ConfigError(f"the prompt is refused: {rule}; {VARIABLE} names the policy")
