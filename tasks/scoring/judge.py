"""Everything that is asked about a run's samples: the judge, the second judge, and what they differ on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_executor import ask_judge
from tasks.scoring.judge_requests import JudgeContext, JudgeRequest, list_questions, list_second
from tasks.scoring.scores import collect_grades
from tasks.scoring.tie_break import find_disputed, read_settled, settle
from tasks.services.llm.executor import Answers
from tasks.services.llm.service import LlmService
from tasks.stage.cache import StageFolder

Show = Callable[[str], Callable[[int, int], None]]


@dataclass
class Grading:
    """JudgeRequests and answers, before anything is made of them."""

    questions: list[JudgeRequest]
    answers: Answers
    failures: dict[str, str]
    second: Answers = field(default_factory=dict)
    second_grades: dict[str, dict[str, int]] = field(default_factory=dict)
    """By sample key and axis."""
    settled: Answers = field(default_factory=dict)
    decided: dict[tuple[str, str], int] = field(default_factory=dict)
    """Grades that settle a dispute, by sample key and axis."""

    @property
    def given(self) -> Answers:
        """All answers of the first judge."""
        return {**self.answers, **self.settled}

    def reasoning(self) -> dict[str, str]:
        """Return what judges thought aloud, by question."""
        second = {f"second judge/{name}": answer for name, answer in self.second.items()}
        return {name: answer.reasoning for name, answer in {**self.given, **second}.items()}


def grade(
    config: ScoringConfig, material: JudgeContext, *, llm: LlmService, folder: StageFolder, show: Show
) -> Grading:
    """Put all questions to the judges.

    Raises:
        ReplyInvalid: more questions failed than `scoring.max_failed_share` allows.

    """

    def ask(questions: list[JudgeRequest], role: str) -> tuple[Answers, dict[str, str]]:
        specs = {question.name: question.spec for question in questions}
        shown = show(role.replace("_", " "))
        return ask_judge(specs, config, llm=llm, folder=folder, role=role, on_progress=shown)

    questions = list_questions(config, material)
    grading = Grading(questions, *ask(questions, "judge"))
    if llm.config.fallback_chain("second_judge"):
        others = list_second(config, material)
        grading.second, _ = ask(others, "second_judge")
        grading.second_grades = collect_grades(others, grading.second)
    disputed = find_disputed(config, material.samples, questions, grading.answers, grading.second_grades)
    grading.settled = settle(disputed, llm=llm, on_progress=show("disputed grades"))
    grading.decided = read_settled(disputed, grading.settled)
    return grading
