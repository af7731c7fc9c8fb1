"""Pairwise comparison of two models: the judge chooses between their samples of one prompt and seed, in both orders."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.manifests.evaluation import Estimate, Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge import ask_judge, check_failures
from tasks.scoring.judge_requests import JudgeContext, JudgeRequest, pair_requests
from tasks.scoring.scores import Judged, read_pairs
from tasks.scoring.statistics import binomial_interval
from tasks.services.llm.batch.jobs import can_batch
from tasks.services.llm.budget.cost_estimate import PlannedRequests
from tasks.services.llm.config import LlmConfig
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService
from tasks.stage.cache import StageFolder

FIRST, SECOND = "first model", "second model"
OUTCOMES = (FIRST, SECOND, "tie", "inconsistent")


@dataclass(frozen=True)
class ModelPair:
    """The samples of two models for one prompt and seed."""

    prompt: str
    """The template: pairs of one prompt depend on each other."""
    first: Sample
    second: Sample

    @property
    def is_identical(self) -> bool:
        """Whether both are the same picture, which no judge has to be asked about."""
        return self.first.image.sha256 == self.second.image.sha256

    @property
    def key(self) -> str:
        """The key of the pair's requests, see `pair_requests`."""
        return f"{self.first.image.key}+{self.second.image.key}"


@dataclass(frozen=True)
class PairwiseWins:
    """Outcomes of the pairs, and how often the second model wins."""

    num_pairs: int
    second_wins: int
    first_wins: int
    ties: int
    inconsistent: int
    """Preferences that changed with the presentation order."""
    failed: int
    """Pairs without a valid reply in both orders."""
    win_rate: Estimate | None
    """Fraction of the decided prompts that the second model wins, with its exact binomial interval (95 %);
    None where no prompt is decided."""
    outcomes: Mapping[str, str]
    """By the key of the pair."""
    served_model: str

    @property
    def is_decided(self) -> bool:
        """Whether the interval excludes one half."""
        rate = self.win_rate
        return rate is not None and rate.low is not None and rate.high is not None and not rate.low <= 0.5 <= rate.high


@dataclass(frozen=True)
class PlannedPairs:
    """Pairs with the requests about them."""

    pairs: tuple[ModelPair, ...]
    requests: tuple[JudgeRequest, ...]

    def estimated(self, config: ScoringConfig, llm: LlmConfig) -> PlannedRequests:
        """Return the requests for a cost estimate."""
        is_batch = config.executor == "batch" and can_batch(llm, "judge")
        return PlannedRequests("judge", [request.spec for request in self.requests], is_batch=is_batch)


def plan_pairs(context: JudgeContext, pairs: Sequence[ModelPair]) -> PlannedPairs:
    """Return pairs with the requests for all that show different pictures, each in both orders."""
    requests = tuple(
        request
        for pair in pairs
        if not pair.is_identical
        for request in pair_requests(context, "model_pair", pair.first, other=pair.second, candidates=(FIRST, SECOND))
    )
    return PlannedPairs(tuple(pairs), requests)


def judge_pairs(
    config: ScoringConfig,
    planned: PlannedPairs,
    *,
    llm: LlmService,
    folder: StageFolder,
    on_progress: Callable[[int, int], None],
) -> PairwiseWins:
    """Ask the judge about all pairs, by batch job or calls as the scoring stage does, and count the outcomes.

    Raises:
        ReplyInvalid: more requests failed than `scoring.max_failed_fraction` allows.
        StillPending: a batch job takes longer than `scoring.max_wait_seconds`.

    """
    specs = {request.name: request.spec for request in planned.requests}
    options = AskOptions("judge", on_progress=on_progress)
    answers, failures = ask_judge(llm, specs, config, folder=folder, options=options) if specs else ({}, {})
    check_failures(config, failures, num_requests=len(specs))
    return count_outcomes(planned.pairs, Judged(planned.requests, answers))


def count_outcomes(pairs: Sequence[ModelPair], judged: Judged) -> PairwiseWins:
    """Return the outcomes of the pairs; a pair that was not answered in both orders counts as failed."""
    found = {
        key: "inconsistent" if set(winners) == {FIRST, SECOND} else winners[0] if winners[0] == winners[1] else "equal"
        for key, winners in read_pairs_by_key(judged).items()
    }
    outcomes = {}
    for pair in pairs:
        outcome = "equal" if pair.is_identical else found.get(pair.key)
        if outcome is not None:
            outcomes[pair.key] = "tie" if outcome == "equal" else outcome
    counts = Counter(outcomes.values())
    return PairwiseWins(
        num_pairs=len(outcomes),
        second_wins=counts[SECOND],
        first_wins=counts[FIRST],
        ties=counts["tie"],
        inconsistent=counts["inconsistent"],
        failed=len(pairs) - len(outcomes),
        win_rate=estimate_win_rate(pairs, outcomes),
        outcomes=outcomes,
        served_model=", ".join(sorted({answer.served_model for answer in judged.answers.values()})),
    )


def read_pairs_by_key(judged: Judged) -> dict[str, tuple[str, ...]]:
    """Return the winner, or `equal`, of both orders by the key of the pair."""
    return {pair.key: pair.winners for pair in read_pairs(judged, "model_pair")}


def estimate_win_rate(pairs: Sequence[ModelPair], outcomes: Mapping[str, str]) -> Estimate | None:
    """Return the fraction of decided prompts that the second model wins, with its exact binomial interval.

    Pairs of one prompt depend on each other, so a prompt counts once: for the model with more wins among its seeds.
    The seeds of a single prompt are independent of each other.
    """
    value = {SECOND: 1, FIRST: -1}
    is_single = len({pair.prompt for pair in pairs}) == 1
    margins: Counter[str] = Counter()
    for pair in pairs:
        margins[pair.key if is_single else pair.prompt] += value.get(outcomes.get(pair.key, ""), 0)
    decided = [margin for margin in margins.values() if margin]
    if not decided:
        return None
    wins = sum(margin > 0 for margin in decided)
    low, high = binomial_interval(wins, len(decided))
    return Estimate(mean=wins / len(decided), low=low, high=high, num=len(decided))
