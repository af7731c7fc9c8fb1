"""The report's section on the judge: how its grades agree with people's and with a second model's."""

from dataclasses import replace

from tasks.manifests.scoring import Agreement
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run, with_grades

PEOPLE = Agreement(
    rater="<people>", num_samples=24,
    kappa={"concept_preservation": 0.625, "prompt_following": None},
    spearman={"concept_preservation": 0.75, "prompt_following": None},
)  # fmt: skip
SECOND = Agreement(rater="another model", num_samples=3, kappa={"image_quality": -0.25}, spearman={})


def test_agreement_with_people_and_a_second_model_is_reported(store: LocalStore) -> None:
    run = with_grades(make_run(store))
    reliability = run.scoring.reliability.model_copy(update={"others": (PEOPLE, SECOND)})
    judged = replace(run, scoring=run.scoring.model_copy(update={"reliability": reliability}))
    page, without = (render_report(store, ReportInputs("t", each, [], [], GATE)) for each in (judged, run))
    section = page.split('<h2 id="judge">', 1)[1].split("<h2", 1)[0]
    assert (
        "<li>Against &lt;people&gt; on 24 samples: concept preservation weighted kappa 0.62, Spearman 0.75; "
        "prompt following weighted kappa –.</li>"
    ) in section
    assert "<li>Against another model on 3 samples: image quality weighted kappa -0.25.</li>" in section
    assert "Against" not in without.split('<h2 id="judge">', 1)[1].split("<h2", 1)[0]
