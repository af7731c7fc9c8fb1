"""Evaluation prompts by kind: the shipped sets, a person's own file, and the files of DreamBench and DreamBench++.

A set is named `set:NAME`, a file `file:PATH`. Both are read while a configuration is validated, which then holds the
prompts themselves: a run's key and its repetition depend on the prompts, not on a path.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from tasks.errors import ConfigError, first_line
from tasks.manifests.evaluation import PromptSet
from tasks.prompts import check_template
from tasks.redaction import clean_text, show_value

SubjectKind = Literal["object", "living"]
FOLDER = Path(__file__).resolve().parent / "prompts"
SET, FILE = "set:", "file:"
PLACEHOLDERS = ("subject", "noun")
OWN_KIND = "custom"
"""Of prompts that name no kind."""
MAX_BYTES, MAX_PROMPTS, MAX_CHARACTERS = 1_000_000, 500, 2_000
# arXiv 2406.16855: nine captions of an image, four photorealistic, three of styles, two imaginative.
DREAMBENCH_PLUS_KINDS = ("scene",) * 4 + ("style",) * 3 + ("imaginative",) * 2
# arXiv 2208.12242: prompts_and_classes.txt lists them in this order.
DREAMBENCH_KINDS = {
    "object": ("scene",) * 20 + ("property",) * 5,
    "living": ("scene",) * 10 + ("accessory",) * 10 + ("property",) * 5,
}
DREAMBENCH_HEADS = {"object": "Object Prompts", "living": "Live Subject Prompts"}
DREAMBENCH_LINE = re.compile(r"""^\s*(['"])(.*)\1\.format\(\s*unique_token\s*,\s*class_token\s*\)""")
Row = dict[str, str]
"""`text` and `kind` of a prompt."""


def check_prompt(template: str) -> str:
    """Return a template that holds {subject} or {noun} and no other placeholder. Raises ValueError."""
    if len(template) > MAX_CHARACTERS or clean_text(template, keep="") != template:
        raise ValueError(f"is not one line of at most {MAX_CHARACTERS:,} printable characters")
    check_template(template, PLACEHOLDERS)
    if not any(f"{{{name}}}" in template for name in PLACEHOLDERS):
        raise ValueError(f"{template[:80]!r} lacks {{subject}} or {{noun}}")
    return template


def check_distinct(templates: Sequence[str]) -> None:
    """Raise ValueError where prompts are the same once filled in, {subject} and {noun} both with the subject's name."""
    first: dict[str, int] = {}
    for number, template in enumerate(templates, 1):
        filled = " ".join(template.replace("{noun}", "{subject}").split())
        if first.setdefault(filled, number) != number:
            raise ValueError(
                f"prompts {first[filled]} and {number} are the same after filling in ({template[:80]!r}); remove one"
            )


def resolve_prompts(source: str, *, class_noun: str, subject_kind: str = "auto") -> list[Row]:
    """Return the prompts that `set:NAME` or `file:PATH` stands for.

    Raises:
        ConfigError: there is no such set or file, or a line of it is no prompt; names the line.

    """
    kind = find_kind(class_noun) if subject_kind == "auto" else subject_kind
    if source.startswith(SET):
        return list_set(source.removeprefix(SET), kind)
    if source.startswith(FILE):
        return read_prompt_file(Path(source.removeprefix(FILE)).expanduser(), kind)
    raise ConfigError(
        f"evaluation.prompts={show_value(source)}: give a list of templates, {FILE}PATH, or {SET}NAME "
        f"({', '.join(read_set_file('object')['sets'])})"
    )


@cache
def read_set_file(kind: str) -> dict[str, dict[str, list[str]]]:
    """Return a shipped file as it is."""
    loaded: dict[str, dict[str, list[str]]] = yaml.safe_load((FOLDER / f"{kind}.yaml").read_text(encoding="utf-8"))
    return loaded


def find_kind(class_noun: str) -> SubjectKind:
    """Return `living` where the noun's last word is known as an animal or a person, else `object`."""
    words = class_noun.lower().split()
    return "living" if words and words[-1] in read_set_file("living")["nouns"] else "object"


def list_set(name: str, kind: str) -> list[Row]:
    """Return a shipped set. Raises ConfigError for a name that there isn't."""
    stored = read_set_file(kind)
    if name not in stored["sets"]:
        raise ConfigError(f"evaluation.prompts={SET}{show_value(name)[1:-1]}: the sets are {', '.join(stored['sets'])}")
    counts: Mapping[str, int] = stored["sets"][name]  # type: ignore[assignment]
    return [{"text": text, "kind": of} for of, num in counts.items() for text in stored["prompts"][of][:num]]


def find_version(kind: str) -> int:
    """Return the version of a shipped file."""
    version: int = read_set_file(kind)["version"]  # type: ignore[assignment]
    return version


def identify_prompts(rows: Sequence[Row], *, class_noun: str, subject_kind: str = "auto") -> PromptSet | None:
    """Return the shipped set that resolved prompts are; None where they are others."""
    kind = find_kind(class_noun) if subject_kind == "auto" else subject_kind
    names = [name for name in read_set_file(kind)["sets"] if list_set(name, kind) == list(rows)]
    return PromptSet(name=f"{kind}/{names[0]}", version=find_version(kind)) if names else None


def read_prompt_file(path: Path, kind: str) -> list[Row]:
    """Return the prompts of a text or YAML file, or of a file of DreamBench or DreamBench++. Raises ConfigError."""
    where = f"evaluation.prompts: {path}"
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:  # a device or a pipe never ends
            raise ConfigError(f"{where} is not a file of at most {MAX_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} can't be read: {first_line(error)}") from error
    if path.suffix.lower() in (".yaml", ".yml"):
        found = list(read_yaml(text, where))
    elif DREAMBENCH_HEADS["object"] in text and "unique_token" in text:
        found = list(read_dreambench(text, kind, where))
    elif (lines := text.splitlines()) and is_dreambench_plus(lines):
        found = list(read_dreambench_plus(lines))
    else:
        found = [
            (number, {"text": line.strip(), "kind": OWN_KIND})
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
    if not 1 <= len(found) <= MAX_PROMPTS:
        raise ConfigError(f"{where} has {len(found)} prompts; 1 to {MAX_PROMPTS} are accepted")
    for number, row in found:
        try:
            check_prompt(row["text"])
        except ValueError as error:
            raise ConfigError(f"{where}, line {number}: {error}") from error
    return [row for _, row in found]


def read_yaml(text: str, where: str) -> Iterator[tuple[int, Row]]:
    """Yield prompts with their lines: a list of templates, or lists by kind, either below `prompts:` too.

    Raises:
        ConfigError: it is no YAML, or of another shape.

    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # nodes know their lines; nothing is constructed
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is no YAML: {first_line(error)}") from error
    if isinstance(root, yaml.MappingNode):
        below = [value for key, value in root.value if key.value == "prompts"]
        root = below[0] if below else root
    groups: list[tuple[str, yaml.Node | None]] = [(OWN_KIND, root)]
    if isinstance(root, yaml.MappingNode):
        groups = [(str(key.value), value) for key, value in root.value]
    for kind, group in groups:
        if not isinstance(group, yaml.SequenceNode):
            line = group.start_mark.line + 1 if group else 1
            raise ConfigError(f"{where}, line {line}: give a list of templates, or such lists by kind")
        for node in group.value:
            if not isinstance(node, yaml.ScalarNode):
                line = node.start_mark.line + 1
                raise ConfigError(f"{where}, line {line}: is no text; quote a template that begins with {{")
            yield node.start_mark.line + 1, {"text": node.value, "kind": kind}


def read_dreambench(text: str, kind: str, where: str) -> Iterator[tuple[int, Row]]:
    """Yield the prompts of DreamBench's `prompts_and_classes.txt` for one kind of subject. Raises ConfigError."""
    lines, rows = text.splitlines(), []
    starts = [number for number, line in enumerate(lines) if line.strip() == DREAMBENCH_HEADS[kind]]
    for number, line in enumerate(lines[starts[0] + 1 :], starts[0] + 2) if starts else ():
        if line.strip() in DREAMBENCH_HEADS.values():
            break
        found = DREAMBENCH_LINE.match(line)
        if found:
            rows.append((number, found[2].replace("{0} {1}", "{noun}")))
    kinds = DREAMBENCH_KINDS[kind]
    if len(rows) != len(kinds):
        raise ConfigError(f"{where} has {len(rows)} prompts below {DREAMBENCH_HEADS[kind]!r}, not {len(kinds)}")
    for (number, template), of in zip(rows, kinds, strict=True):
        yield number, {"text": template, "kind": of}


def is_dreambench_plus(lines: list[str]) -> bool:
    """Whether lines are a caption file of DreamBench++: the subject's name, then nine captions without placeholders."""
    rows = [line.strip() for line in lines if line.strip()]
    return len(rows) == 1 + len(DREAMBENCH_PLUS_KINDS) and not any(char in "".join(rows) for char in "{}#")


def read_dreambench_plus(lines: list[str]) -> Iterator[tuple[int, Row]]:
    """Yield the captions of a DreamBench++ file, with the subject's name replaced by {noun}."""
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    name = numbered[0][1]
    for (number, caption), kind in zip(numbered[1:], DREAMBENCH_PLUS_KINDS, strict=True):
        # A caption that doesn't name its subject fails the check for placeholders, with its line.
        yield number, {"text": re.sub(rf"\b{re.escape(name)}\b", "{noun}", caption, flags=re.IGNORECASE), "kind": kind}
