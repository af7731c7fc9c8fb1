"""The samples of compared runs beside each other: as a page, as a contact sheet, and as the judge chooses."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from flows.cli.results.compare import Extras, compare_runs, load_candidate
from flows.cli.results.comparison.page import MAX_CHARACTERS, Page, encode_rows
from flows.cli.results.comparison.side_by_side import MAX_ROWS, list_rows, load_compared
from flows.cli.results.tables import Format
from flows.runs.records import read_run
from tasks.errors import ArtifactCorrupt, BudgetExceeded, ConfigError
from tasks.images import encode_png, read_mark
from tests.support.comparison import PROMPTS, make_run
from tests.support.llm import CHAT
from tests.support.llm_server import ScriptedServer, scripted_server
from tests.support.tiny import draw_photo

SEEDS = 2


def compare(output: Path, *names: str, as_format: Format = "json", **extras: object) -> str:
    return compare_runs(output, names, is_paired=True, as_format=as_format, extras=Extras(**extras))  # type: ignore[arg-type]


def test_the_page_shows_every_shared_prompt_and_seed_of_all_runs_and_is_self_contained(tmp_path: Path) -> None:
    for name in ("run-a", "run-b", "run-c"):
        make_run(tmp_path, name)
    page = compare(tmp_path, "run-a", "run-b", "run-c", as_format="html")
    assert page.startswith("<!doctype html>")
    assert page.count("<figure>") == PROMPTS * SEEDS * 3
    assert len(set(re.findall(r'src="(data:image/[^"]+)"', page))) == PROMPTS * SEEDS * 3
    # Prompts are text of others, and nothing is fetched.
    assert "sks fish &lt;0&gt;" in page
    assert "sks fish <0>" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page
    for text in ("One training seed per model", "DINO (subject fidelity)", "warning: the grades of run-c"):
        assert text in page


def test_only_shared_seeds_are_shown_and_none_is_said(tmp_path: Path) -> None:
    make_run(tmp_path, "run-a")
    make_run(tmp_path, "run-b", first_seed=1001)
    make_run(tmp_path, "run-c", first_seed=2000)
    assert compare(tmp_path, "run-a", "run-b", as_format="html").count("<figure>") == PROMPTS * 2
    page = compare_runs(tmp_path, ("run-a", "run-c"), is_paired=False, as_format="html")
    assert "The models share no prompt and seed." in page


def test_a_page_of_large_samples_stays_small_by_showing_every_nth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(tmp_path, name) for name in ("run-a", "run-b")]
    runs = [read_run(folder) for folder in folders]
    compared = load_compared(folders, runs, [load_candidate(run) for run in runs])
    rows = list_rows(compared)
    assert len(encode_rows(Page("", (), (), compared, rows))) == PROMPTS * SEEDS
    size = sum(len(cell.url) for row in encode_rows(Page("", (), (), compared, rows)) for cell in row.cells)
    assert size < MAX_CHARACTERS
    monkeypatch.setattr("flows.cli.results.comparison.page.MAX_CHARACTERS", size // 2)
    shown = encode_rows(Page("", (), (), compared, rows))
    assert 0 < len(shown) <= PROMPTS * SEEDS // 2
    assert sum(len(cell.url) for row in shown for cell in row.cells) <= size // 2 * 1.05


def test_the_contact_sheet_is_marked_and_replaces_no_other_file(tmp_path: Path) -> None:
    for name in ("run-a", "run-b"):
        make_run(tmp_path, name)
    path = tmp_path / "sheet.png"
    for _ in range(2):  # its own file is replaced
        compare(tmp_path, "run-a", "run-b", samples=path)
    with Image.open(path) as sheet:
        assert sheet.height > PROMPTS * SEEDS * 128
        colors = {color for _, color in sheet.convert("RGB").getcolors(1_000_000) or ()}
    for name in ("run-a", "run-b"):
        assert (sum(map(ord, name)) % 256, 20, 90) in colors
    assert read_mark(path.read_bytes())["Title"] == "likeness compare run-a run-b"
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    for file, reason in (("photo.png", "is no generated image"), ("sheet.jpg", "ends in .png")):
        with pytest.raises(ConfigError, match=rf"--samples.*{reason}"):
            compare(tmp_path, "run-a", "run-b", samples=tmp_path / file)


def test_a_contact_sheet_of_many_rows_shows_every_nth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ROWS >= 100
    monkeypatch.setattr("flows.cli.results.comparison.side_by_side.MAX_ROWS", 3)
    for name in ("run-a", "run-b"):
        make_run(tmp_path, name)
    compare(tmp_path, "run-a", "run-b", samples=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 4 * 160


def test_a_sample_that_was_changed_is_named_with_its_run(tmp_path: Path) -> None:
    for name in ("run-a", "run-b"):
        make_run(tmp_path, name)
    folders = [tmp_path / name for name in ("run-a", "run-b")]
    runs = [read_run(folder) for folder in folders]
    compared = load_compared(folders, runs, [load_candidate(run) for run in runs])
    [row, *_] = list_rows(compared)
    compared[1].store.delete(row.samples[1].image.key)
    with pytest.raises(ArtifactCorrupt, match="a sample of run-b can't be shown: .* is missing"):
        compared[1].read(row.samples[1])


def make_judged(output: Path, server: ScriptedServer, *words: str) -> None:
    """Write two runs whose judge is a scripted server."""
    settings = (f"llm.profiles.local.base_url={server.url}", "scoring.poll_seconds=0.05", *words)
    for name in ("run-a", "run-b"):
        make_run(output, name, *settings, photo=encode_png(draw_photo(0, size=64)), is_judged=True)


@pytest.mark.parametrize(
    ("better", "field"), [("equal", "ties"), ("first", "inconsistent"), ("second", "inconsistent")]
)
def test_the_judges_choices_are_counted_cached_and_part_of_the_conclusion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], better: str, field: str
) -> None:
    with scripted_server() as server:
        server.script(json.dumps({"evidence": "e", "better": better}))
        make_judged(tmp_path, server)
        found = json.loads(compare(tmp_path, "run-a", "run-b", is_judged=True))
        asked = server.counts["row"] + server.counts[CHAT]
        assert asked == 2 * PROMPTS * SEEDS
        printed = capsys.readouterr().err
        assert "judge local: 32 requests by batch job, expected 0.00000 USD" in printed
        assert printed.count("judge: 0/32") == 1
        page = compare(tmp_path, "run-a", "run-b", is_judged=True, as_format="html")
        assert server.counts["row"] + server.counts[CHAT] == asked  # cached
    pairs = found["pairs"]["run-b"]
    assert pairs[field] == pairs["num_pairs"] == PROMPTS * SEEDS
    assert pairs["win_rate"] is None
    assert "no prompt is decided" in found["conclusion"]
    assert page.count(f"judge: <b>{field.removesuffix('s')}</b>") == PROMPTS * SEEDS
    rows = (tmp_path / "run-a" / "ledger.jsonl").read_text().splitlines()
    assert sum('"cached"' not in row for row in rows) == asked


def test_the_embedded_judge_prefers_the_model_that_draws_the_subject(tmp_path: Path) -> None:
    def draw(name: str, prompt: int, number: int) -> Image.Image:
        # Run b draws the subject of the photos, run a another one.
        return draw_photo(prompt % 5, seed=7 if name == "run-b" else 40 + number, size=64)

    for name in ("run-a", "run-b"):
        make_run(tmp_path, name, draw=draw, photo=encode_png(draw_photo(0, size=64)), is_judged=True)
    found = json.loads(compare(tmp_path, "run-a", "run-b", is_judged=True))
    pairs = found["pairs"]["run-b"]
    assert pairs["wins"] > 3 * pairs["losses"]
    assert pairs["win_rate"]["num"] <= PROMPTS
    assert pairs["win_rate"]["low"] < pairs["win_rate"]["mean"]
    assert re.search(r"The judge prefers run-b in \d+ and run-a in \d+ of 16 pairs", found["conclusion"])
    assert "decided prompts, so run-b is preferred" in found["conclusion"]
    assert found["pairs"]["run-b"]["served_model"] == "mini-vision"


def test_what_the_judge_cannot_choose_between_is_one_line(tmp_path: Path) -> None:
    with scripted_server() as server:
        make_judged(tmp_path, server, "scoring=sync")
        make_run(tmp_path, "run-c", photo=b"another")
        make_run(tmp_path, "run-d", first_seed=2000, photo=encode_png(draw_photo(0, size=64)))
        make_run(tmp_path, "run-e", photo=encode_png(draw_photo(0, size=64)))
        for names, reason in (
            (("run-a", "run-c"), "was tuned on other photos"),
            (("run-a", "run-d"), "share no prompt and seed"),
            (("run-e", "run-a"), "run run-e was not judged"),
        ):
            with pytest.raises(ConfigError, match=rf"{reason}") as caught:
                compare_runs(tmp_path, names, is_paired=False, as_format="json", extras=Extras(is_judged=True))
            assert "\n" not in str(caught.value)
        assert server.counts[CHAT] == 0


def test_the_judge_is_bound_to_the_budget_of_the_first_run(tmp_path: Path) -> None:
    prices = ("llm.profiles.local.prices.input=1000", "llm.profiles.local.prices.output=1000")
    with scripted_server() as server:
        server.script(json.dumps({"evidence": "e", "better": "equal"}))
        make_judged(tmp_path, server, *prices, "llm.budget_usd=0.01", "scoring=sync")
        with pytest.raises(BudgetExceeded):
            compare(tmp_path, "run-a", "run-b", is_judged=True)
        assert server.counts[CHAT] == 0
