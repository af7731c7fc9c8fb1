"""The judge's choice between two models: both orders, prompts as units, identical pictures never asked about."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ReplyInvalid
from tasks.images import encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge_requests import JudgeContext
from tasks.scoring.pairwise.models import (
    FIRST,
    SECOND,
    ModelPair,
    PlannedPairs,
    count_outcomes,
    judge_pairs,
    plan_pairs,
)
from tasks.scoring.scores import Judged
from tasks.scoring.statistics import binomial_interval
from tasks.services.llm.chat.request import Answer
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.llm import CHAT, make_llm
from tests.support.llm_server import scripted_server
from tests.support.tiny import draw_photo

PROMPTS, SEEDS = 4, 2


def make_sample(model: str, prompt: int, seed: int, *, sha256: str = "") -> Sample:
    key = f"04-evaluation/{model}/{prompt}-{seed}.png"
    return Sample(
        image=ObjectRef(key=key, sha256=sha256 or key, size_bytes=1), side="tuned", kind="subject", prompt="sks fish",
        class_prompt="a fish", seed=seed, template=f"{{subject}} {prompt}",
    )  # fmt: skip


def plan(*, prompts: int = PROMPTS, seeds: int = SEEDS, is_identical: bool = False) -> PlannedPairs:
    same = "same" if is_identical else ""
    pairs = [
        ModelPair(f"{{subject}} {prompt}", *(make_sample(model, prompt, seed, sha256=same) for model in "ab"))
        for prompt in range(prompts)
        for seed in range(seeds)
    ]
    references = [encode_png(draw_photo(number, size=64)) for number in range(2)]

    def read(sample: Sample) -> bytes:
        return encode_png(draw_photo(sample.seed, seed=sum(map(ord, sample.image.key)), size=64))

    return plan_pairs(JudgeContext("fish", references, samples=[], others=[], read=read), pairs)


def decide(planned: PlannedPairs, choose: Any) -> Any:
    """Count outcomes where a judge chooses `first model`, `second model` or `equal` by prompt, seed and order."""
    answers = {}
    for request in planned.requests:
        prompt, seed = request.key.partition("+")[0].rpartition("/")[2].removesuffix(".png").split("-")
        wanted = choose(int(prompt), int(seed), request.is_swapped)
        order = (SECOND, FIRST) if request.is_swapped else (FIRST, SECOND)
        better = {order[0]: "first", order[1]: "second", "equal": "equal"}.get(wanted, wanted)
        answers[request.name] = Answer(request.spec.reply.model_construct(evidence="e", better=better), "p", "m")
    return count_outcomes(planned.pairs, Judged(planned.requests, answers))


def test_wins_ties_and_position_bias_are_counted_and_prompts_are_the_units_of_the_interval() -> None:
    def choose(prompt: int, seed: int, is_swapped: bool) -> str:
        if prompt == 3:
            return "first"  # whichever stands first: inconsistent
        if prompt == 2:
            return "equal" if seed else FIRST
        return SECOND

    found = decide(plan(), choose)
    assert (found.num_pairs, found.first_wins, found.second_wins, found.ties, found.inconsistent) == (8, 1, 4, 1, 2)
    # Three prompts are decided, two of them for the second model; by pairs it would be four of five.
    assert (found.win_rate.mean, found.win_rate.num) == (pytest.approx(2 / 3), 3)
    assert (found.win_rate.low, found.win_rate.high) == binomial_interval(2, 3)
    assert not found.is_decided


def test_a_model_that_wins_every_prompt_of_many_is_preferred_and_of_few_is_not() -> None:
    many = decide(plan(prompts=6), lambda *_: SECOND)
    assert many.is_decided
    assert many.win_rate.low == pytest.approx(0.5407, abs=1e-4)  # 0.025 ** (1 / 6)
    assert not decide(plan(prompts=5), lambda *_: SECOND).is_decided
    assert decide(plan(prompts=6), lambda *_: FIRST).win_rate.mean == 0


def test_the_seeds_of_a_single_prompt_are_the_units() -> None:
    assert decide(plan(prompts=1, seeds=6), lambda *_: SECOND).win_rate.num == 6


def test_nothing_decided_has_no_win_rate() -> None:
    found = decide(plan(), lambda *_: "equal")
    assert (found.ties, found.win_rate, found.is_decided) == (8, None, False)


def test_identical_pictures_are_ties_without_a_request() -> None:
    planned = plan(is_identical=True)
    assert planned.requests == ()
    assert count_outcomes(planned.pairs, Judged((), {})).ties == PROMPTS * SEEDS


def ask(folder: Path, server: Any, executor: str) -> Any:
    llm = make_llm(server, folder)
    config = make_config(ScoringConfig, executor=executor, poll_seconds=0.05)
    stage = StageFolder(llm.store, "scoring", "k")
    return judge_pairs(config, plan(prompts=2), llm=llm, folder=stage, on_progress=lambda done, total: None)


@pytest.mark.parametrize("executor", ["batch", "sync"])
def test_both_executors_send_each_pair_in_both_orders_and_cache_the_replies(tmp_path: Path, executor: str) -> None:
    with scripted_server() as server:
        server.script(json.dumps({"evidence": "e", "better": "second"}))
        found = ask(tmp_path, server, executor)
        assert (found.inconsistent, found.num_pairs, found.failed) == (4, 4, 0)
        asked = server.counts["row"] + server.counts[CHAT]
        assert asked == 8
        assert ask(tmp_path, server, "sync").outcomes == found.outcomes
        assert server.counts["row"] + server.counts[CHAT] == asked


def test_too_many_failed_pairs_raise(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script("no JSON")
        with pytest.raises(ReplyInvalid, match="8 of 8 judge requests failed"):
            ask(tmp_path, server, "sync")


def test_a_pair_that_was_answered_in_one_order_alone_counts_as_failed() -> None:
    planned = plan(prompts=1, seeds=1)
    request = planned.requests[0]
    reply = request.spec.reply.model_construct(evidence="e", better="first")
    found = count_outcomes(planned.pairs, Judged(planned.requests, {request.name: Answer(reply, "p", "m")}))
    assert (found.num_pairs, found.failed) == (0, 1)


def test_the_estimate_counts_both_orders(tmp_path: Path) -> None:
    with scripted_server() as server:
        llm = make_llm(server, tmp_path)
        estimated = plan(prompts=2).estimated(make_config(ScoringConfig, executor="batch"), llm.config)
        assert (len(estimated.specs), estimated.is_batch) == (8, True)
        assert not plan().estimated(make_config(ScoringConfig, executor="sync"), llm.config).is_batch
    assert isinstance(llm.store, LocalStore)
