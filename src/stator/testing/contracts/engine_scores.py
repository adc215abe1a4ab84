"""Of the engine contract: probabilities of tokens, and which tokens may come."""

import math
from collections.abc import Sequence
from typing import Any

from stator.core.resuming import first_used
from stator.errors import ErrorCode
from stator.messages.engine import SamplingParams, TokenScore
from stator.messages.grammar import Choice, Literal
from stator.testing.contracts.engine_suite import EngineSettings, EngineSuite, make_request
from stator.testing.engine_bench import BenchEngine, RecordingSink

_FIELDS: dict[str, Any] = {
    "logprobs": 2,
    "prompt_logprobs": 2,
    "logit_bias": ((5, 1.0),),
    "allowed_token_ids": (5, 6),
    "grammar": Choice((Literal("yes"), Literal("no"))),
}
_ENDS = {"grammar"}
"""An output with these ends by itself, with whatever is left of ignore_eos."""


def output_scores(sink: RecordingSink) -> list[TokenScore]:
    """One for each token, whatever the deltas were."""
    for delta in sink.deltas:
        assert delta.scores is not None and len(delta.scores) == len(delta.token_ids)
    return [score for delta in sink.deltas for score in delta.scores or ()]


class EngineScoresContract(EngineSuite):
    score_tolerance: float = 0.0
    """By how much the probability of a token may differ between prompt and output."""

    def can(self, one: BenchEngine, **fields: Any) -> bool:
        return first_used(SamplingParams(max_tokens=1, **fields), one.info.cannot) is None

    def same(self, scores: Sequence[TokenScore], others: Sequence[TokenScore]) -> bool:
        return len(scores) == len(others) and all(
            math.isclose(a.logprob, b.logprob, abs_tol=self.score_tolerance, rel_tol=0.0)
            for a, b in zip(scores, others, strict=True)
        )

    def test_what_an_engine_cannot_do_is_refused_by_name(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            assert set(one.info.cannot) <= set(SamplingParams.__struct_fields__)
            for field, value in _FIELDS.items():
                fields: dict[str, Any] = {field: value, "ignore_eos": field not in _ENDS}
                sink = one.generate(make_request(field, self.prompt(5), **fields))
                if self.can(one, **{field: value}):
                    num_tokens = len((await sink.wait()).token_ids)
                    assert num_tokens < 12 if field in _ENDS else num_tokens == 12
                    continue
                error = await sink.wait_error()
                assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, field)
                assert field in error.message

        self.run(scenario)

    def test_tokens_outside_the_vocabulary_are_refused(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            beyond = self.vocab_size + 100_000
            cases: list[tuple[str, Any]] = [("logit_bias", ((beyond, 1.0),)), ("allowed_token_ids", (beyond,))]
            for field, value in cases:
                error = await one.generate(make_request(field, self.prompt(5), **{field: value})).wait_error()
                assert error.param == field

        self.run(scenario)

    def test_scores_do_not_change_the_text_and_fit_it(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not self.can(one, logprobs=3):
                return
            prompt = self.prompt(self.block_size + 3)
            plain = await one.generate(make_request("plain", prompt)).wait()
            assert [delta.scores for delta in plain.deltas] == [None] * len(plain.deltas)
            scored = await one.generate(make_request("scored", prompt, logprobs=3)).wait()
            assert scored.token_ids == plain.token_ids
            for token_id, score in zip(scored.token_ids, output_scores(scored), strict=True):
                assert (score.rank, score.top_ids[0], score.top_logprobs[0]) == (1, token_id, score.logprob)
                assert len(score.top_ids) == len(set(score.top_ids)) == len(score.top_logprobs) == 3
                assert score.top_logprobs == sorted(score.top_logprobs, reverse=True)
                assert 0.0 < sum(map(math.exp, score.top_logprobs)) <= 1.0 + 1e-6
            alone = await one.generate(make_request("alone", prompt, logprobs=0)).wait()
            assert all(score.top_ids == score.top_logprobs == [] for score in output_scores(alone))
            assert self.same(output_scores(alone), output_scores(scored))

        self.run(scenario)

    def test_scores_are_those_of_the_model_whatever_the_sampling(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not self.can(one, logprobs=1, prompt_logprobs=1):
                return
            prompt = self.prompt(5)
            fields: dict[str, Any] = {"temperature": 1.8, "seed": 11, "frequency_penalty": 1.5, "logprobs": 1}
            drawn = await one.generate(make_request("drawn", prompt, **fields)).wait()
            scores = output_scores(drawn)
            assert any(score.rank > 1 for score in scores)
            whole = make_request("whole", [*prompt, *drawn.token_ids], max_tokens=1, prompt_logprobs=1)
            told = (await one.generate(whole).wait()).deltas[0].prompt_scores
            assert told is not None and self.same(told[-len(scores) :], scores)
            assert [score.rank for score in told[-len(scores) :]] == [score.rank for score in scores]

        self.run(scenario)

    def test_scores_of_a_prompt_are_complete_also_if_it_is_cached_or_preempted(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not self.can(one, prompt_logprobs=2):
                return
            prompt = self.prompt(3 * self.block_size + 1)
            first = await one.generate(make_request("a", prompt, prompt_logprobs=2)).wait()
            told = first.deltas[0].prompt_scores
            assert told is not None and len(told) == len(prompt) - 1
            assert all(delta.prompt_scores is None for delta in first.deltas[1:])
            plain = make_request("b", prompt)
            await self.settle(one.engine)
            assert one.engine.cached_prefix_tokens(plain) > 0, "its blocks are of use to others"
            again = await one.generate(make_request("c", prompt, prompt_logprobs=2)).wait()
            assert again.num_cached == 0
            assert self.same(again.deltas[0].prompt_scores or [], told)
            many = [
                two.generate(make_request(str(n), self.prompt(len(prompt), n), max_tokens=40, prompt_logprobs=0))
                for n in range(4)
            ]
            for n, sink in enumerate(many):
                given = (await sink.wait()).deltas[0].prompt_scores
                assert given is not None and len(given) == len(prompt) - 1
                assert n or self.same(given, told)

        self.run(scenario, EngineSettings(num_blocks=12))

    def test_scores_go_on_with_a_resumed_request(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not self.can(one, logprobs=1, logit_bias=((5, 1.0),)):
                return
            prompt = self.prompt(9)
            fields: dict[str, Any] = {"logprobs": 1, "logit_bias": ((5, -3.0), (77, 4.0))}
            whole = await one.generate(make_request("whole", prompt, **fields)).wait()
            for cut in (1, 7):
                rest = await two.generate(make_request(f"{cut}", prompt, whole.token_ids[:cut], **fields)).wait()
                assert rest.token_ids == whole.token_ids[cut:]
                assert self.same(output_scores(rest), output_scores(whole)[cut:])

        self.run(scenario)

    def test_bias_and_allowed_tokens_decide_what_comes(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not self.can(one, logit_bias=((5, 1.0),), allowed_token_ids=(5,)):
                return
            prompt = self.prompt(7)
            text = await one.text(make_request("plain", prompt))
            forced = await one.text(make_request("forced", prompt, logit_bias=((77, 1000.0),)))
            assert forced == [77] * 12
            barred = await one.text(make_request("barred", prompt, logit_bias=((text[0], -1000.0),)))
            assert text[0] not in barred
            allowed = await one.text(
                make_request("allowed", prompt, allowed_token_ids=(8, 9, 10), temperature=1.0, seed=1)
            )
            assert set(allowed) <= {8, 9, 10} and len(set(allowed)) > 1

        self.run(scenario)
