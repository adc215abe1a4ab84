"""Of the engine contract: outputs of a form that was asked for. On engines of a model with a tokenizer."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from stator.config.models import resolve_model
from stator.errors import ErrorCode
from stator.messages.engine import EngineRequest, FinishReason
from stator.messages.grammar import Choice, Grammar, Json, Literal, OwnGrammar, Regex, Sequence, TextUntil
from stator.messages.tokens import pack
from stator.processor.tokenizer import ModelTokenizer
from stator.testing.contracts.engine_suite import EngineSettings, EngineSuite, make_request
from stator.testing.engine_bench import WAIT_S, BenchEngine, RecordingSink

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["calm", "cross"]},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["age", "mood", "tags"],
    "additionalProperties": False,
}
CALL = Sequence((TextUntil("<call>"), Json(PERSON), Literal("</call>")))


class EngineGrammarContract(EngineSuite):
    tokenizer_of = "stator:tiny-llama"
    own_grammar = 'start: "yes" | "no"'
    """In the dialect of the engine's backend."""
    bad_grammars: tuple[Grammar, ...] = (
        Json({"type": "nonsense"}),
        Regex("(a"),
        OwnGrammar("start: %%"),
    )

    bombs: tuple[Grammar, ...] = (
        # Of xgrammar too many for one item, so that vLLM asks llguidance: which writes each out, and ends its process.
        Json({"type": "array", "prefixItems": [{"type": "string"}], "minItems": 1_000_000_000}),
        OwnGrammar('start: %json {"type": "array", "minItems": 1000000000}'),
    )
    """Whose compilation ends the process that it happens in, with llguidance 1.7; 1.9 takes them as they come."""
    bombs_go_off = False

    def _request(self, name: str, grammar: Grammar, **fields: Any) -> EngineRequest:
        wanted: dict[str, Any] = {"grammar": grammar, "ignore_eos": False, "max_tokens": 100, **fields}
        return make_request(name, self.prompt(9), **wanted)

    def _text(self, sink: RecordingSink) -> str:
        tokenizer = ModelTokenizer.load(Path(resolve_model(self.tokenizer_of)))
        return tokenizer.decode(sink.token_ids)

    def test_an_output_has_the_form_that_was_asked_for(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            asked: list[tuple[Grammar, str]] = [
                (Choice((Literal("yes"), Literal("no"))), "yes|no"),
                (Regex("[a-c]{3}-[0-9]{2}"), "[a-c]{3}-[0-9]{2}"),
                (OwnGrammar(self.own_grammar), "yes|no"),
            ]
            for number, (grammar, pattern) in enumerate(asked):
                for temperature in (0.0, 1.0):
                    name = f"{number}-{temperature}"
                    sink = one.generate(self._request(name, grammar, temperature=temperature, seed=number))
                    assert (await sink.wait()).finish_reason is FinishReason.STOP
                    assert re.fullmatch(pattern, self._text(sink)), self._text(sink)
            people = [one.generate(self._request(f"p{n}", Json(PERSON), temperature=1.0)) for n in range(4)]
            for sink in people:
                assert (await sink.wait()).finish_reason is FinishReason.STOP
                person = json.loads(self._text(sink))
                assert person.keys() == {"age", "mood", "tags"}
                assert 0 <= person["age"] <= 120 and person["mood"] in ("calm", "cross") and person["tags"]

        self.run(scenario)

    def test_a_part_may_be_free(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            grammar = Sequence((Literal("<call>"), Json(PERSON), Literal("</call>")))
            sink = one.generate(self._request("a", grammar, max_tokens=300))
            assert (await sink.wait()).finish_reason is FinishReason.STOP
            text = self._text(sink)
            assert text.startswith("<call>{") and text.endswith("}</call>")
            cut = one.generate(self._request("b", CALL, max_tokens=8))
            assert len((await cut.wait()).token_ids) <= 8

        self.run(scenario)

    def test_it_does_not_depend_on_room(self) -> None:
        """Sequences that are preempted compute what they had again, and go on with it."""

        async def alone(one: BenchEngine, two: BenchEngine) -> None:
            for n in range(6):
                sink = await one.generate(self._request(f"a{n}", Json(PERSON), seed=n)).wait()
                texts.append(sink.token_ids)

        async def crowded(one: BenchEngine, two: BenchEngine) -> None:
            sinks = [one.generate(self._request(f"c{n}", Json(PERSON), seed=n)) for n in range(6)]
            assert [(await sink.wait()).token_ids for sink in sinks] == texts

        texts: list[list[int]] = []
        self.run(alone)
        self.run(crowded, settings=EngineSettings(num_blocks=9))

    def test_one_that_goes_on_is_exact_or_refused(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            whole = (await one.generate(self._request("whole", Json(PERSON), temperature=1.0, seed=5)).wait()).token_ids
            if "grammar" in one.info.cannot_resume:
                return
            for cut in range(1, len(whole), 3):
                request = self._request(f"from-{cut}", Json(PERSON), temperature=1.0, seed=5)
                sink = two.generate(msgspec.structs.replace(request, resume_ids=pack(whole[:cut])))
                assert whole[:cut] + (await sink.wait()).token_ids == whole

        self.run(scenario)

    def test_what_cannot_be_compiled_is_refused_and_harms_nobody(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            other = one.generate(make_request("other", self.prompt(9)))
            for number, grammar in enumerate(self.bad_grammars):
                error = await one.generate(self._request(f"bad{number}", grammar)).wait_error()
                assert error.code is ErrorCode.INVALID_REQUEST, (grammar, error)
            assert len((await other.wait()).token_ids) == 12
            assert (await one.generate(self._request("good", Json(PERSON))).wait()).token_ids

        self.run(scenario)

    def test_one_that_ends_the_process_which_compiles_it_does_not_end_the_engine(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            other = one.generate(make_request("other", self.prompt(9)))
            for number, grammar in enumerate(self.bombs):
                for again in range(2):
                    sink = one.generate(self._request(f"bomb{number}-{again}", grammar, max_tokens=20))
                    await asyncio.wait_for(sink.ended.wait(), WAIT_S)
                    error = sink.error
                    if self.bombs_go_off or error is not None:
                        assert error is not None and error.code is ErrorCode.INVALID_REQUEST, (grammar, error)
                        # By its memory or, on a machine that is slow to give it, by its time.
                        assert error.param == "grammar" and "compil" in error.message
                    else:
                        assert len(sink.token_ids) == 20
            assert len((await other.wait()).token_ids) == 12
            assert (await one.generate(self._request("good", Json(PERSON))).wait()).token_ids

        self.run(scenario)

    def test_one_may_be_aborted_at_once(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            request = self._request("a", Json(PERSON))
            sink = one.generate(request)
            one.engine.abort(request.request_id)
            assert (await sink.wait_error()).code is ErrorCode.CANCELLED
            assert (await one.generate(request).wait()).token_ids

        self.run(scenario)

    def test_min_tokens_does_not_hold_what_is_complete(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if "grammar" in one.info.cannot_resume:
                return  # vLLM's own rules are its own.
            sink = one.generate(self._request("a", Choice((Literal("yes"),)), min_tokens=30))
            assert (await sink.wait()).finish_reason is not None
            assert self._text(sink) == "yes"

        self.run(scenario)
