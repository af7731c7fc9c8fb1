"""The options of `likeness generate`."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.arguments import MAX_INTEGER, complete_run

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run folder, its name, the end of its name, or latest; or a diffusers folder, a LoRA or an embedding.",
        autocompletion=complete_run,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help='For example "a photo of sks fish in the snow".', show_default=False),
]
Num = Annotated[int, typer.Option(min=1, max=1000, help="Images per prompt.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_INTEGER, help="Of the first image; random unless given.")]
Size = Annotated[
    int | None, typer.Option(min=8, max=4096, metavar="PX", help="Side of the image; default: the model's.")
]
Sampler = Annotated[
    str | None, typer.Option(metavar="NAME", help="ddim, dpm++, euler, or a scheduler class of diffusers.")
]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; default: evaluation's.")]
Guidance = Annotated[float | None, typer.Option(min=1, max=30, help="Default: evaluation's.")]
Negative = Annotated[str, typer.Option(metavar="PROMPT", help="Negative prompt.")]
LoraScale = Annotated[float, typer.Option(min=0, max=2, help="Strength of a LoRA; 1: as trained.")]
PromptsFile = Annotated[Path | None, typer.Option(metavar="TXT", help="Prompts, one per line.", show_default=False)]
HasGrid = Annotated[bool, typer.Option("--grid", help="Write all images as one grid too.")]
GridGuidance = Annotated[
    str | None,
    typer.Option(metavar="G,G,...", help="One labelled sheet with these guidance scales.", show_default=False),
]
GridSteps = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="One labelled sheet with these denoising steps.", show_default=False),
]
Out = Annotated[
    Path | None, typer.Option(metavar="PNG", help="Output file; default: in the run's folder, or the current one.")
]
Candidate = Annotated[
    int | None, typer.Option(min=0, max=MAX_INTEGER, metavar="STEP", help="Use the checkpoint of this step.")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="BASE", help="Base model of a LoRA or embedding: an option of diffusion, or a diffusers folder."
    ),
]
Token = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="How prompts name an embedding from elsewhere; default sks.")
]
IsChecked = Annotated[
    bool | None,
    typer.Option(
        "--safety-checker/--no-safety-checker",
        help="Refuse images by the base model's safety checker, where it has one (Stable Diffusion 1.x); "
        "default: as evaluation.safety_checker.",
        show_default=False,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        metavar="PEM",
        envvar="LIKENESS_C2PA_CERTIFICATE",
        help="Sign images with C2PA content credentials: the certificate chain.",
        show_default=False,
    ),
]
PrivateKey = Annotated[
    Path | None,
    typer.Option(metavar="PEM", envvar="LIKENESS_C2PA_KEY", help="The certificate's private key.", show_default=False),
]
IsOpened = Annotated[bool, typer.Option("--open", help="Show the image, or the grid.")]
