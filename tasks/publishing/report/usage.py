"""How to use a tuned model: snippets for likeness, diffusers, ComfyUI and A1111, with the place of its files."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tasks.diffusion.hub import MINI_FOLDER
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.prompts import name_subject

Snippet = tuple[str, str]
"""A name, and the text to copy."""
MINI_BASE = "tasks/mini/weights/base"
"""Relative to a checkout of this project."""
LORA_FILE = "lora_kohya.safetensors"
EMBEDS_FILE = "learned_embeds.safetensors"
CONVERTERS = {
    "stable_diffusion": "convert_diffusers_to_original_stable_diffusion.py",
    "stable_diffusion_xl": "convert_diffusers_to_original_sdxl.py",
}
"""In `scripts/` of diffusers' repository, by family."""
TRANSFORMERS = {"stable_diffusion_3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}

WHOLE = "pipeline = DiffusionPipeline.from_pretrained({folder!r})"
BASE = "pipeline = DiffusionPipeline.from_pretrained({location!r}{revision})"
LORA = 'pipeline.load_lora_weights({folder!r}, weight_name="pytorch_lora_weights.safetensors")'
ONE_ENCODER = 'pipeline.load_textual_inversion({folder!r}, weight_name="learned_embeds.safetensors", token={token!r})'
TWO_ENCODERS = """from safetensors.torch import load_file

vectors = load_file({file!r})
pipeline.load_textual_inversion(
    vectors["clip_l"], token={token!r}, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
)
pipeline.load_textual_inversion(
    vectors["clip_g"], token={token!r}, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
)"""


@dataclass(frozen=True)
class ModelPlace:
    """Where a reader finds the files of a tuned model."""

    folder: str
    """Absolute where it is on the reader's disk; else the name of the folder after it was fetched."""
    comment: str = ""
    """How the folder gets there: a command, or what it lies beside; empty where it is there already."""
    run: str = ""
    """The run's name, where `likeness` finds it."""
    output: str = ""
    """The output folder that holds the run."""
    has_checkout: bool = False
    """Whether the weights that this project ships are on the reader's disk."""


BESIDE_REPORT = ModelPlace("model", "# model: the folder beside the one of this report")
"""Of a report as it is stored: it is copied and logged with its model, and knows no other place."""


@dataclass(frozen=True)
class UsedModel:
    """What decides how a tuned model is loaded and prompted."""

    class_noun: str
    identifier_token: str
    family: str
    method: str
    base: str
    """Location of the base model."""
    revision: str | None

    @property
    def has_token(self) -> bool:
        """Whether it has a learned token."""
        return self.method.startswith("textual_inversion")

    @property
    def name(self) -> str:
        """The subject's name in a prompt."""
        return name_subject(identifier_token=self.identifier_token, class_noun=self.class_noun)

    @property
    def name_in_diffusers(self) -> str:
        """The subject's name in a prompt of diffusers, which expands a learned token's first placeholder."""
        token = f"<{self.identifier_token}>" if self.has_token else self.identifier_token
        return name_subject(identifier_token=token, class_noun=self.class_noun)

    @property
    def stem(self) -> str:
        """The name, without suffix, of its file in other programs."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-") or "subject"


def describe_model(subject: SubjectSet, tuned: TunedModel) -> UsedModel:
    """Return what decides how a tuned model is used."""
    base = tuned.base_model
    return UsedModel(
        subject.class_noun, subject.identifier_token, tuned.family, tuned.method, base.location, base.revision
    )


def write_snippets(model: UsedModel, place: ModelPlace = BESIDE_REPORT) -> list[Snippet]:
    """Return how to use the tuned model, with the paths of its place."""
    snippets = [*write_command(model, place), ("diffusers", write_python(model, place))]
    if model.base == "mini":
        text = "Neither loads the mini model, whose layers are smaller than any architecture they know."
        return [*snippets, ("ComfyUI and A1111", text)]
    if model.method == "textual_inversion+full":
        text = (
            f"Neither loads a whole model with a learned token: their tokenizers lack <{model.identifier_token}>.\n"
            "Use the command line or diffusers; or train by training/method=textual_inversion+lora."
        )
        return [*snippets, ("ComfyUI and A1111", text)]
    write = write_whole if model.method == "full" else write_adapters
    return [*snippets, *write(model, place)]


def write_command(model: UsedModel, place: ModelPlace) -> list[Snippet]:
    """Return the `likeness` command; none where it finds no run and the folder holds two adapters."""
    prompt = shlex.quote(f"a photo of {model.name} in the snow")
    if place.run:
        words = f"likeness generate {shlex.quote(place.run)} {prompt}"
        return [("Command line", f"{words} --output-dir {shlex.quote(place.output)}")]
    if model.method == "textual_inversion+lora":
        return []
    token = f" --token {shlex.quote(model.identifier_token)}" if model.method == "textual_inversion" else ""
    # A base model in a folder is no option of `diffusion`, by which the command finds that of an adapter.
    is_folder = model.method != "full" and Path(model.base).is_absolute()
    base = f" --base {shlex.quote(model.base)}" if is_folder else ""
    lines = [place.comment, f"likeness generate {shlex.quote(place.folder)} {prompt}{token}{base}"]
    return [("Command line", "\n".join(filter(None, lines)))]


def write_python(model: UsedModel, place: ModelPlace) -> str:
    """Return a program that draws one image with diffusers."""
    prompt = f"a photo of {model.name_in_diffusers}"
    head = ([comment(place.comment)] if place.comment else []) + ["from diffusers import DiffusionPipeline", ""]
    return "\n".join(
        [
            *head,
            write_loading(model, place),
            f'pipeline({prompt!r}).images[0].save("sample.png")',
        ]
    )


def write_loading(model: UsedModel, place: ModelPlace) -> str:
    """Return Python lines that load the tuned model with diffusers."""
    folder, token = place.folder, f"<{model.identifier_token}>"
    # Covers `textual_inversion+full`: a whole pipeline holds its learned tokens.
    if model.method.endswith("full"):
        return WHOLE.format(folder=folder)
    mini = str(MINI_FOLDER / "base") if place.has_checkout else MINI_BASE
    revision = f", revision={model.revision!r}" if model.revision else ""
    lines = [BASE.format(location=mini if model.base == "mini" else model.base, revision=revision)]
    if model.has_token and model.family == "stable_diffusion_3":
        lines.append("# diffusers' pipeline of this family loads no textual inversion: use `likeness generate`")
    elif model.has_token:
        # Only CLIP encoders learn tokens, and Flux has one of them beside T5.
        has_one_encoder = model.family in ("stable_diffusion", "flux")
        lines.append(
            ONE_ENCODER.format(folder=folder, token=token)
            if has_one_encoder
            else TWO_ENCODERS.format(file=f"{folder}/{EMBEDS_FILE}", token=token)
        )
    if model.method.endswith("lora"):
        lines.append(LORA.format(folder=folder))
    return "\n".join(lines)


def write_whole(model: UsedModel, place: ModelPlace) -> list[Snippet]:
    """Return how other programs take a whole model: converted to one file."""
    name, prompt = model.stem, f"a photo of {model.name}"
    file = f"{name}.safetensors"
    head = [place.comment] if place.comment else []
    if model.family in CONVERTERS:
        script = CONVERTERS[model.family]
        convert = [
            *head,
            f"# scripts/{script} of https://github.com/huggingface/diffusers",
            f"python {script} --use_safetensors --model_path {shlex.quote(place.folder)} --checkpoint_path {file}",
        ]
        folders = {"ComfyUI": "ComfyUI/models/checkpoints", "A1111": "stable-diffusion-webui/models/Stable-diffusion"}
        use = {"ComfyUI": f"Load Checkpoint: {file}", "A1111": f"checkpoint: {file}"}
        return [
            (tool, "\n".join([*convert, f"mv {file} {folder}/", f"# {use[tool]}", f"# prompt: {prompt}"]))
            for tool, folder in folders.items()
        ]
    kind = TRANSFORMERS[model.family]
    lines = [
        *map(comment, head),
        f"from diffusers import {kind}",
        "",
        "# One file: diffusers writes a large transformer in several",
        f'transformer = {kind}.from_pretrained({place.folder!r}, subfolder="transformer", torch_dtype="auto")',
        f'transformer.save_pretrained({name!r}, max_shard_size="100GB")',
        f"# {name}/diffusion_pytorch_model.safetensors to ComfyUI/models/diffusion_models/{file}",
        f"# Load Diffusion Model: {file}; text encoders and VAE of {model.base}",
        f"# prompt: {prompt}",
    ]
    return [("ComfyUI", "\n".join(lines)), ("A1111", refuse_family(model))]


def write_adapters(model: UsedModel, place: ModelPlace) -> list[Snippet]:
    """Return which files of adapters go where in other programs, and the prompt."""
    name = model.stem
    has_lora = model.method.endswith("lora")
    snippets = []
    for tool, loras, embeddings in (
        ("ComfyUI", "ComfyUI/models/loras", "ComfyUI/models/embeddings"),
        ("A1111", "stable-diffusion-webui/models/Lora", "stable-diffusion-webui/embeddings"),
    ):
        if tool == "A1111" and model.family in TRANSFORMERS:
            snippets.append((tool, refuse_family(model)))
            continue
        lines = [place.comment] if place.comment else []
        called = model.name
        if model.has_token:
            lines.append(write_copy(f"{place.folder}/{EMBEDS_FILE}", f"{embeddings}/{name}.safetensors"))
            called = f"{'embedding:' if tool == 'ComfyUI' else ''}{name} {model.class_noun}"
        prompt = f"# prompt: a photo of {called}"
        if has_lora:
            lines.append(write_copy(f"{place.folder}/{LORA_FILE}", f"{loras}/{name}.safetensors"))
            prompt += f" <lora:{name}:1>" if tool == "A1111" else ""
        base = model.base
        loader = f", then Load LoRA: {name}.safetensors, strength 1.0" if has_lora and tool == "ComfyUI" else ""
        lines.append(f"# {'Load Checkpoint' if tool == 'ComfyUI' else 'checkpoint'}: {base}{loader}")
        snippets.append((tool, "\n".join([*lines, prompt])))
    return snippets


def write_copy(source: str, target: str) -> str:
    """Return a shell command that copies a file."""
    return f"cp {shlex.quote(source)} {target}"


def refuse_family(model: UsedModel) -> str:
    """Return why A1111 has no snippet."""
    return f"It doesn't load {model.base}; use ComfyUI."


def comment(text: str) -> str:
    """Return a line as a comment of Python or a shell."""
    return text if text.startswith("#") else f"# {text}"
