"""The `likeness` command: thin, calls the flows."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tasks.errors import ConfigError, LikenessError
from tasks.redaction import clean_text, redact

EPILOG = """examples:
  likeness run                                         the demo: five photos of a drawn fish
  likeness run subject.source=photos subject.class_noun=mug
  likeness run training.max_train_steps=400 training.learning_rate=5e-5
  likeness run diffusion=sd15 llm=openai subject.source=photos subject.class_noun=dog
  likeness runs                                        what has been run
  likeness gc                                          what can be removed
  likeness report                                      where the newest report is
  likeness generate latest "a photo of sks fish at night"
  likeness doctor llm=openai                           do keys and models work, before anything is paid for
  likeness cost                                        what the newest run's configuration paid, reruns included
  likeness jobs                                        remote batch jobs, with their cost so far
  likeness review                                      talk about the newest run's captions, and change them
  likeness sweep training.learning_rate=5e-5,1e-4 training.max_train_steps=150,300

settings are key=value words; conf/run.yaml lists them all with their defaults.
"""
RUN_HELP = "run folder, its name or the end of it, or latest"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = make_parser().parse_args(argv)
    quiet_libraries()
    try:
        command: Callable[[argparse.Namespace], int] = options.action
        return command(options)
    except LikenessError as error:
        print(f"{error.kind}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(explain_os_error(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run again to go on from here", file=sys.stderr)
        return 130


def quiet_libraries() -> None:
    """Keep bars and notes of libraries off the terminal; what is set still wins."""
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TQDM_DISABLE", "1"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    # Where they are installed: kernels and image processors that nothing here uses.
    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def explain_os_error(error: OSError) -> str:
    """Return one line for an error of the operating system; a full disk says what to do."""
    from tasks.stage.files import explain_full_disk

    try:
        with explain_full_disk(Path(str(error.filename or "the output folder"))):
            raise error
    except LikenessError as explained:
        return f"{type(explained).__name__}: {explained}"
    except OSError:
        return f"{type(error).__name__}: {clean_text(redact(str(error)))}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="likeness",
        description="Turn 3-5 photos of one subject into a tuned, scored, published text-to-image model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser

    run = add("run", help="run the whole job; with no settings, the demo")
    run.add_argument("settings", nargs="*", metavar="key=value", help="for example training.max_train_steps=400")
    run.set_defaults(action=run_job)

    sweep = add("sweep", help="search settings: give each several values")
    sweep.add_argument("settings", nargs="+", metavar="key=v1,v2", help="several values sweep, one value is fixed")
    sweep.add_argument("--trials", type=whole_number, default=0, help="how many trials (default: every combination)")
    sweep.add_argument("--study", default="", help="name of a study to go on with")
    sweep.set_defaults(action=sweep_settings)

    report = add("report", help="say where a run's report is")
    report.add_argument("run", nargs="?", default="latest", help=RUN_HELP)
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.set_defaults(action=show_report)

    generate = add("generate", help="draw a picture with a run's tuned model")
    generate.add_argument("run", help=RUN_HELP)
    generate.add_argument("prompt", help='for example "a photo of sks fish in the snow"')
    generate.add_argument("--seed", type=whole_number, help="default: a random one, which is printed")
    generate.add_argument("--out", type=Path, help="PNG file (default: in the run's folder)")
    generate.add_argument("--steps", type=positive_number, help="denoising steps (default: as in evaluation)")
    generate.add_argument("--guidance", type=guidance_number, help="guidance scale (default: as in evaluation)")
    generate.add_argument("--candidate", type=whole_number, metavar="STEP", help="weights kept of another step")
    generate.set_defaults(action=generate_picture)

    estimate = add("estimate", help="predict memory, LLM calls and money, before anything is loaded or sent")
    estimate.add_argument("settings", nargs="*", metavar="key=value", help="as for run")
    estimate.set_defaults(action=estimate_memory)

    llm_commands = add_llm_commands(add)
    runs = add("runs", help="list runs, newest first")
    runs.add_argument("--json", action="store_true", help="print every run's summary.json as one list")
    runs.set_defaults(action=list_runs)
    garbage = add("gc", help="list what no run refers to and what cut-off runs left; --delete removes it")
    garbage.add_argument("--delete", action="store_true", help="remove it; without this nothing is removed")
    garbage.add_argument("--days", type=float, default=7.0, help="leave what is younger (default: 7)")
    garbage.set_defaults(action=collect_garbage)
    for command in (report, generate, runs, garbage, *llm_commands):
        command.add_argument("--output-dir", type=Path, default=Path("runs"), help="default: runs")
    return parser


def add_llm_commands(add: Callable[..., argparse.ArgumentParser]) -> tuple[argparse.ArgumentParser, ...]:
    """Add the commands about LLMs; return those that take an output folder."""
    pending = add("pending", help="resume runs whose batch jobs were still running (exit code 11: some still wait)")
    pending.set_defaults(action=finish_pending)

    doctor = add("doctor", help="try every LLM profile: key, model list, retirement, schema, pictures, tools, ...")
    doctor.add_argument("settings", nargs="*", metavar="key=value", help="as for run, for example llm=openai")
    doctor.set_defaults(action=examine_profiles)

    review = add("review", help="talk with an LLM about a run's photos and captions, and change captions")
    review.add_argument("run", nargs="?", default="latest", help=RUN_HELP)
    review.set_defaults(action=review_captions)

    jobs = add("jobs", help="list, show, adopt, cancel or discard remote batch jobs, with their cost so far")
    jobs.add_argument("job_action", nargs="?", default="list", choices=("list", "show", "adopt", "cancel", "discard"))
    jobs.add_argument("job", nargs="?", default="", help="the provider's id of a job")
    jobs.add_argument("--profile", default="", help="LLM profile of a job that no run here made")
    jobs.set_defaults(action=manage_jobs)

    cost = add("cost", help="what a configuration asked of LLMs and what it paid, over all its runs")
    cost.add_argument("run", nargs="?", default="latest", help=RUN_HELP)
    cost.add_argument("--json", action="store_true", help="print the totals as JSON")
    cost.set_defaults(action=show_cost)
    return pending, review, jobs, cost


def whole_number(text: str) -> int:
    """Read a seed or count: 0 to 2**63."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def positive_number(text: str) -> int:
    """Read a number of steps: 1 to 1000."""
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError("must be 1 to 1000")
    return value


def guidance_number(text: str) -> float:
    """Read a guidance scale: 1 to 30."""
    value = float(text)
    if not 1 <= value <= 30:
        raise argparse.ArgumentTypeError("must be 1 to 30")
    return value


def run_job(options: argparse.Namespace) -> int:
    """Run the main job, on an embedded Prefect server where none is configured."""
    from flows.cli.run import run_in_terminal

    return run_in_terminal(options.settings)


def sweep_settings(options: argparse.Namespace) -> int:
    """Run a sweep."""
    from flows.cli.run import sweep_in_terminal

    return sweep_in_terminal(options.settings, num_trials=options.trials, study=options.study)


def show_report(options: argparse.Namespace) -> int:
    """Print where the report is."""
    folder = find_run(options.output_dir, options.run)
    path = folder / "report.html"
    if not path.exists():
        raise ConfigError(f"run {folder.name} has no report; it did not finish")
    print(path)
    if options.open:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())
    return 0


def generate_picture(options: argparse.Namespace) -> int:
    """Draw one picture."""
    from flows.cli.generate import generate

    folder = find_run(options.output_dir, options.run)
    path, seed = generate(
        folder,
        options.prompt,
        seed=options.seed,
        out=options.out,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        candidate=options.candidate,
    )
    print(f"{path}  seed {seed}")
    return 0


def estimate_memory(options: argparse.Namespace) -> int:
    """Print what training would take, for the configured method and the others."""
    from flows.cli.estimate import print_estimates

    print_estimates(options.settings)
    return 0


def finish_pending(options: argparse.Namespace) -> int:
    """Go on with suspended runs."""
    from flows.cli.run import finish_pending as go_on

    return go_on(options.output_dir)


def examine_profiles(options: argparse.Namespace) -> int:
    """Try what the LLM profiles claim."""
    from flows.cli.doctor import print_examination

    return print_examination(options.settings)


def review_captions(options: argparse.Namespace) -> int:
    """Talk about captions."""
    from flows.cli.review import review

    path = review(find_run(options.output_dir, options.run))
    if path is not None:
        print(f"captions: {path}\nto train with them, run again with subject.captions={path}")
    return 0


def manage_jobs(options: argparse.Namespace) -> int:
    """Look after batch jobs."""
    from flows.cli.jobs import run_jobs_command

    return run_jobs_command(options.output_dir, options.job_action, options.job, profile=options.profile)


def show_cost(options: argparse.Namespace) -> int:
    """Print what a configuration paid."""
    from flows.cli.cost import find_paying_run, print_costs

    print_costs(find_paying_run(options.output_dir, options.run), is_json=options.json)
    return 0


def list_runs(options: argparse.Namespace) -> int:
    """Print all runs."""
    import json

    from flows.cli.run import print_runs
    from flows.run_records import list_summaries

    summaries = list_summaries(options.output_dir)
    if options.json:
        print(json.dumps(summaries, indent=1))
    else:
        print_runs(summaries, folder=options.output_dir)
    return 0


def collect_garbage(options: argparse.Namespace) -> int:
    """List or remove what can go."""
    from flows.cli.gc import print_garbage

    print_garbage(options.output_dir, days=options.days, is_deleting=options.delete)
    return 0


def find_run(output: Path, name: str) -> Path:
    """Return a run's folder. Raises ConfigError where there is none."""
    from flows.run_records import list_run_folders

    folders = list_run_folders(output)
    finished = [folder for folder in folders if (folder / "report.html").exists()]
    if name == "latest" and finished:
        return finished[-1]
    path = Path(name).absolute()  # a shell completes names to paths
    matches = [folder for folder in folders if folder.absolute() == path]
    matches = matches or [folder for folder in folders if folder.name == name or folder.name.endswith(f"-{name}")]
    if len(matches) == 1:
        return matches[0]
    raise ConfigError(f"no run {name!r} in {output}; `likeness runs` lists them")


if __name__ == "__main__":
    sys.exit(main())
