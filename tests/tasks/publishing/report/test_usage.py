"""The snippets that users copy, for every kind of tuned model, and a report beside its model."""

import ast
import shlex
from dataclasses import replace

import pytest

from tasks.publishing.report.page import ReportInputs, render_report
from tasks.publishing.report.placement import NearbyModel, place_report
from tasks.publishing.report.usage import BESIDE_REPORT, ModelPlace, Snippet, UsedModel, describe_model, write_snippets
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run

METHODS = ("full", "lora", "textual_inversion", "textual_inversion+lora", "textual_inversion+full")
FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
HERE = ModelPlace("/out put/run-1/model", run="run-1", output="/out put", has_checkout=True)
FETCHED = ModelPlace("run-1/model", "likeness publish run-1 --to run-1", "run-1", "/out put", has_checkout=True)


def tune(method: str, *, family: str = "stable_diffusion", base: str = "some/base") -> UsedModel:
    return UsedModel("tea pot", "sks", family, method, base, None)


def write(method: str, place: ModelPlace, **fields: str) -> dict[str, str]:
    return dict(write_snippets(tune(method, **fields), place))


def read_strings(python: str) -> set[str]:
    nodes = ast.walk(ast.parse(python))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_model_has_snippets_with_its_real_folder(method: str, family: str) -> None:
    snippets = write(method, HERE, family=family)
    assert {"Command line", "diffusers"} <= set(snippets)
    text = "\n".join(snippets.values())
    assert "latest" not in text and "THIS FOLDER" not in text
    words = shlex.split(snippets["Command line"])
    assert words == ["likeness", "generate", "run-1", "a photo of sks tea pot in the snow", "--output-dir", "/out put"]
    strings = read_strings(snippets["diffusers"])
    if not (method == "textual_inversion" and family == "stable_diffusion_3"):  # diffusers loads none there
        assert any(string.startswith("/out put/run-1/model") for string in strings)
    token = "<sks>" if method.startswith("textual_inversion") else "sks"
    assert f"a photo of {token} tea pot" in strings


def list_copies(text: str) -> dict[str, str]:
    """Return the targets of the shell's copies by their source."""
    words = [shlex.split(line) for line in text.splitlines() if line.startswith("cp ")]
    return {source.rpartition("/")[2]: target for _, source, target in words}


@pytest.mark.parametrize(
    ("method", "comfy", "webui", "prompt", "webui_prompt"),
    [
        ("lora", {"lora_kohya.safetensors": "ComfyUI/models/loras/sks-tea-pot.safetensors"},
         {"lora_kohya.safetensors": "stable-diffusion-webui/models/Lora/sks-tea-pot.safetensors"},
         "a photo of sks tea pot", "a photo of sks tea pot <lora:sks-tea-pot:1>"),
        ("textual_inversion", {"learned_embeds.safetensors": "ComfyUI/models/embeddings/sks-tea-pot.safetensors"},
         {"learned_embeds.safetensors": "stable-diffusion-webui/embeddings/sks-tea-pot.safetensors"},
         "a photo of embedding:sks-tea-pot tea pot", "a photo of sks-tea-pot tea pot"),
        ("textual_inversion+lora",
         {"learned_embeds.safetensors": "ComfyUI/models/embeddings/sks-tea-pot.safetensors",
          "lora_kohya.safetensors": "ComfyUI/models/loras/sks-tea-pot.safetensors"},
         {"learned_embeds.safetensors": "stable-diffusion-webui/embeddings/sks-tea-pot.safetensors",
          "lora_kohya.safetensors": "stable-diffusion-webui/models/Lora/sks-tea-pot.safetensors"},
         "a photo of embedding:sks-tea-pot tea pot", "a photo of sks-tea-pot tea pot <lora:sks-tea-pot:1>"),
    ],
)  # fmt: skip
def test_files_of_adapters_go_where_other_programs_look_for_them(
    method: str, comfy: dict[str, str], webui: dict[str, str], prompt: str, webui_prompt: str
) -> None:  # fmt: skip
    snippets = write(method, HERE)
    assert list_copies(snippets["ComfyUI"]) == comfy
    assert list_copies(snippets["A1111"]) == webui
    assert snippets["ComfyUI"].endswith(f"# prompt: {prompt}")
    assert snippets["A1111"].endswith(f"# prompt: {webui_prompt}")
    assert "some/base" in snippets["ComfyUI"] and "some/base" in snippets["A1111"]


def test_the_files_that_snippets_name_are_those_that_training_writes() -> None:
    from tasks.diffusion.lora.adapters import KOHYA_FILE
    from tasks.diffusion.textual_inversion import EMBEDS_FILE
    from tasks.publishing.report import usage

    assert (usage.LORA_FILE, usage.EMBEDS_FILE) == (KOHYA_FILE, EMBEDS_FILE)


def test_a_whole_model_is_converted_for_other_programs() -> None:
    snippets = write("full", HERE, family="stable_diffusion_xl")
    [line] = [line for line in snippets["A1111"].splitlines() if line.startswith("python ")]
    words = shlex.split(line)
    assert words[1] == "convert_diffusers_to_original_sdxl.py"
    assert words[words.index("--model_path") + 1] == "/out put/run-1/model"
    assert "mv sks-tea-pot.safetensors stable-diffusion-webui/models/Stable-diffusion/" in snippets["A1111"]
    assert "mv sks-tea-pot.safetensors ComfyUI/models/checkpoints/" in snippets["ComfyUI"]
    transformer = write("full", HERE, family="flux")
    assert "/out put/run-1/model" in read_strings(transformer["ComfyUI"])
    assert "doesn't load some/base" in transformer["A1111"]


def test_programs_that_cannot_load_a_model_are_not_promised() -> None:
    assert "tokenizers lack <sks>" in write("textual_inversion+full", HERE)["ComfyUI and A1111"]
    assert "loads the mini model" in write("lora", HERE, base="mini")["ComfyUI and A1111"]


def test_the_base_models_revision_is_pinned_where_it_is_known() -> None:
    assert "revision" not in write("lora", HERE)["diffusers"]
    pinned = dict(write_snippets(replace(tune("lora"), revision="r1"), HERE))
    assert "from_pretrained('some/base', revision='r1')" in pinned["diffusers"]


def test_the_mini_models_folder_is_the_one_on_this_disk() -> None:
    from tasks.diffusion.hub import MINI_FOLDER

    assert str(MINI_FOLDER / "base") in read_strings(write("lora", HERE, base="mini")["diffusers"])
    elsewhere = write("lora", BESIDE_REPORT, base="mini")["diffusers"]
    assert str(MINI_FOLDER) not in elsewhere


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_a_bucket_is_fetched_first(method: str) -> None:
    snippets = write(method, FETCHED)
    assert snippets["diffusers"].startswith("# likeness publish run-1 --to run-1\n")
    ast.parse(snippets["diffusers"])
    if method in ("lora", "textual_inversion"):
        assert snippets["ComfyUI"].startswith("likeness publish run-1 --to run-1\ncp run-1/model/")


def test_a_copy_of_a_model_is_used_without_its_run() -> None:
    place = ModelPlace("/copy/model")
    words = shlex.split(write("lora", place)["Command line"])
    assert words == ["likeness", "generate", "/copy/model", "a photo of sks tea pot in the snow"]
    assert write("textual_inversion", place)["Command line"].endswith(" --token sks")
    # Its folder holds two files, of which `likeness generate` takes one.
    assert "Command line" not in write("textual_inversion+lora", place)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_snippets_quote_locations_and_names(method: str, family: str) -> None:
    hostile = '/a folder/it\'s "here"'
    model = replace(tune(method, family=family, base=hostile), class_noun='fish "$(id)" \'n', identifier_token="s'\"k")
    snippets = dict(write_snippets(model, ModelPlace(f"{hostile}/model", run="r", output=hostile)))
    words = shlex.split(snippets["Command line"])
    assert words[3] == f"a photo of s'\"k {model.class_noun} in the snow"
    assert words[-1] == hostile
    texts = read_strings(snippets["diffusers"])
    if not method.endswith("full"):
        assert hostile in texts
    assert any(text.endswith(model.class_noun) for text in texts)
    for tool in {"ComfyUI", "A1111"} & set(snippets):
        for line in snippets[tool].splitlines():
            if line.startswith(("cp ", "python ")):
                assert any(word.startswith(f"{hostile}/model") for word in shlex.split(line))
            elif "$(id)" in line:
                assert line.startswith("#")


def test_a_model_is_described_by_the_manifests_of_its_run(store: LocalStore) -> None:
    run = make_run(store)
    assert describe_model(run.subject, run.training) == UsedModel("fish", "sks", "stable_diffusion", "full", "m", None)


def render(store: LocalStore, snippets: list[Snippet]) -> str:
    run = make_run(store)
    hostile = replace(run, subject=run.subject.model_copy(update={"traits": ("<!--downloads--><!--usage-->",)}))
    return render_report(store, ReportInputs("t", hostile, (), (), GATE, snippets=snippets))


def test_a_placed_report_has_the_snippets_and_links_of_its_place(store: LocalStore) -> None:
    page = render(store, [("old", "stored snippet")])
    names = ["README.md", "lineage.json", "pytorch_lora_weights.safetensors", "unet/a.safetensors"]
    placed = place_report(page, NearbyModel([("Command line", r"cp '\1' <x>")], "../model", names))
    assert "stored snippet" not in placed
    assert '<pre tabindex="0" aria-label="Command line">cp &#39;\\1&#39; &lt;x&gt;</pre>' in placed
    assert '<a href="../model/pytorch_lora_weights.safetensors" download>' in placed
    assert '<a href="../model/lineage.json" download>lineage.json</a>' in placed
    assert "a.safetensors" not in placed
    assert "&lt;!--downloads--&gt;" in placed, "texts of others are no places"


def test_a_report_without_its_model_nearby_keeps_its_snippets_and_has_no_links(store: LocalStore) -> None:
    placed = place_report(render(store, [("old", "stored snippet")]), NearbyModel())
    assert "stored snippet" in placed
    assert "lineage.json" not in placed and "Download:" not in placed
