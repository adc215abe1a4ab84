"""Of the engine contract: embeddings, or their refusal by name."""

import asyncio
import math
from array import array

from stator.errors import ErrorCode
from stator.ids import RequestId
from stator.messages.embeddings import Embedding, EmbedRequest
from stator.messages.tokens import pack
from stator.testing.contracts.engine_suite import EngineSuite, make_request
from stator.testing.engine_bench import BenchEngine, RecordingSink


def embed(one: BenchEngine, name: str, prompt: list[int], *, dimensions: int | None = None) -> RecordingSink:
    sink = RecordingSink()
    one.engine.embed(EmbedRequest(RequestId(name), pack(prompt), dimensions), sink)
    return sink


async def vector_of(one: BenchEngine, name: str, prompt: list[int]) -> list[float]:
    (item,) = (await embed(one, name, prompt).wait()).received
    assert isinstance(item, Embedding) and item.num_tokens == len(prompt)
    return array("f", item.vector).tolist()


class EngineEmbeddingsContract(EngineSuite):
    embedding_tolerance: float = 0.0
    """By how much a number may differ with what else is computed."""

    can_generate: bool = True

    def equal(self, vector: list[float], other: list[float]) -> bool:
        return len(vector) == len(other) and all(
            math.isclose(a, b, rel_tol=0.0, abs_tol=self.embedding_tolerance)
            for a, b in zip(vector, other, strict=True)
        )

    def test_an_engine_that_cannot_make_embeddings_says_so(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if one.info.can_embed:
                return
            error = await embed(one, "a", self.prompt(5)).wait_error()
            assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "model")
            assert one.info.engine in error.message

        self.run(scenario)

    def test_embeddings_depend_on_the_input_alone(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not one.info.can_embed:
                return
            prompts = [self.prompt(length, length) for length in (1, self.block_size, 70, 2 * self.block_size + 3, 150)]
            alone = [await vector_of(one, str(n), prompt) for n, prompt in enumerate(prompts)]
            assert len({len(vector) for vector in alone}) == 1
            for vector in alone:
                assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-5)
            assert not any(self.equal(alone[0], vector) for vector in alone[1:])
            together = await asyncio.gather(*(vector_of(two, str(n), prompt) for n, prompt in enumerate(prompts)))
            assert all(self.equal(a, b) for a, b in zip(alone, together, strict=True))

        self.run(scenario)

    def test_embeddings_and_sequences_do_not_disturb_each_other(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not (one.info.can_embed and self.can_generate):
                return
            request = make_request("text", self.prompt(20), max_tokens=30)
            prompt = self.prompt(200, 1)
            text, vector = await one.text(request), await vector_of(one, "alone", prompt)
            running = two.generate(request)
            beside = await asyncio.gather(*(vector_of(two, str(n), prompt) for n in range(3)))
            assert all(self.equal(vector, other) for other in beside)
            assert (await running.wait()).token_ids == text

        self.run(scenario)

    def test_embeddings_can_be_aborted(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not one.info.can_embed:
                return
            sinks = [embed(one, f"{n}", self.prompt(200, n)) for n in range(4)]
            await asyncio.sleep(0)
            for n in (0, 2, 3):
                one.engine.abort(RequestId(f"{n}"))
            for n in (0, 2, 3):
                assert (await sinks[n].wait_error()).code is ErrorCode.CANCELLED
                assert sinks[n].received == []
            await sinks[1].wait()
            one.engine.abort(RequestId("1"))
            assert len(await vector_of(one, "0", self.prompt(3))) > 1, "an id is free again"

        self.run(scenario)

    def test_inputs_that_cannot_be_computed_are_refused(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not one.info.can_embed:
                return
            cases = {"empty": [], "beyond": [self.vocab_size + 100_000], "long": [5] * (one.info.max_model_len + 1)}
            for name, prompt in cases.items():
                assert (await embed(one, name, prompt).wait_error()).code is ErrorCode.INVALID_REQUEST
            error = await embed(one, "cut", self.prompt(5), dimensions=2).wait_error()
            assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "dimensions")

        self.run(scenario)

    def test_an_engine_that_stops_ends_embeddings(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            if not one.info.can_embed:
                return
            sinks = [embed(one, f"{n}", self.prompt(200, n)) for n in range(3)]
            await asyncio.sleep(0)
            await one.engine.stop()
            for sink in sinks:
                assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
            error = await embed(one, "late", self.prompt(5)).wait_error()
            assert error.code is ErrorCode.ENGINE_DEAD

        self.run(scenario, ends_engines=True)
