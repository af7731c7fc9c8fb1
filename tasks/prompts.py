"""Prompt templates: known placeholders only, filled from a class noun and an identifier token."""

import re
from collections.abc import Callable, Sequence


def choose_article(noun: str) -> str:
    """Return `a` or `an`."""
    return "an" if noun[:1].lower() in "aeiou" else "a"


def check_template(template: str, names: Sequence[str], *, required: Sequence[str] = ()) -> str:
    """Return a template whose braces hold the named placeholders only.

    Raises:
        ValueError: it has another placeholder or a lone brace, or lacks a required placeholder.

    """
    # Templates come from users and are filled by `replace`, never `format`, which would evaluate `{x.__class__}`.
    rest = re.sub("|".join(rf"\{{{name}\}}" for name in names), "", template)
    allowed = " and ".join(f"{{{name}}}" for name in names)
    if "{" in rest or "}" in rest:
        found = re.search(r"\{[^{}]{0,40}\}?|\}", rest)
        raise ValueError(f"may hold {allowed} only, not {found[0] if found else rest[:40]!r}")
    for name in required:
        if f"{{{name}}}" not in template:
            raise ValueError(f"{template[:80]!r} lacks {{{name}}}")
    return template


def write_class_prompt(template: str, *, class_noun: str) -> str:
    """Return the class prompt, for example `a photo of a dog`."""
    return template.replace("{article}", choose_article(class_noun)).replace("{class_noun}", class_noun)


def name_subject(*, identifier_token: str, class_noun: str) -> str:
    """Return the subject's name in a prompt, for example `sks dog`."""
    return f"{identifier_token} {class_noun}"


def write_subject_prompt(template: str, *, identifier_token: str, class_noun: str) -> str:
    """Return an evaluation prompt with the subject: both {subject} and {noun} become `sks dog`."""
    name = name_subject(identifier_token=identifier_token, class_noun=class_noun)
    return template.replace("{subject}", name).replace("{noun}", name)


def write_plain_prompt(template: str, *, class_noun: str) -> str:
    """Return the same prompt without the identifier, as CLIP-T takes it: {subject} becomes `a dog`, {noun} `dog`."""
    plain = template.replace("{subject}", f"{choose_article(class_noun)} {class_noun}")
    return plain.replace("{noun}", class_noun)


def truncate_prompt(prompt: str, *, fits: Callable[[str], bool]) -> str:
    """Return a prompt shortened from its end until it fits: by comma-separated phrases, then by words."""
    while not fits(prompt):
        head = prompt.rpartition(", ")[0] or prompt.rpartition(" ")[0]
        if not head:
            return prompt  # a single word is cut by the tokenizer
        prompt = head
    return prompt
