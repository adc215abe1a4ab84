"""Endpoint `embeddings`: inputs to vectors. Each input is routed, and computed elsewhere if its instance fails, by
itself; what one of them fails of ends the request.
"""

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from stator.core.sequence_limits import cannot_embed
from stator.errors import StatorError
from stator.ids import InstanceId
from stator.messages.embeddings import Embedding, EmbeddingsRequest, EmbedRequest
from stator.messages.engine import SamplingParams
from stator.messages.processor import RouteDecision
from stator.messages.tokens import TokenBuffer
from stator.processor import embedding_inputs
from stator.processor.attempt import Attempt, TokenSink
from stator.processor.deferred import DeferredWork, guarded, stopping
from stator.processor.generation import Generation, GenerationRequest, Shared
from stator.processor.output import OutputText
from stator.processor.part_call import PartCall
from stator.processor.prompt_jobs import TextPrompt
from stator.processor.prompts import Prompts
from stator.processor.tokenizer import ModelTokenizer
from stator.transport.base import Call, Endpoint, StreamHandle, Target

INPUTS_AT_ONCE = 32
"""Of one request at the router and the engines; the others wait for these."""

_ONE_TOKEN = SamplingParams(max_tokens=1)


@functools.lru_cache(maxsize=4096)
def _embed_target(addresses: tuple[str, ...], instance_id: InstanceId) -> Target:
    return Target(addresses, "embed", instance_id)


class Embeddings:
    """models: the names of the one that is served; the first is the router's. prompts, deferred: as `prompts.Prompts`
    has them.

    Owns its open calls until `close`, which ends them with DRAINING.
    """

    def __init__(
        self,
        *,
        models: tuple[str, ...],
        tokenizer: ModelTokenizer,
        max_model_len: int,
        shared: Shared,
        prompts: Prompts,
        deferred: DeferredWork,
    ) -> None:
        self._models = models
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._shared = shared
        self._prompts = prompts
        self._deferred = deferred
        self._output = OutputText(tokenizer.detokenizer(), (), min_tokens=0, stop_ids=())
        self._open: dict[_Inputs, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def num_open(self) -> int:
        return len(self._open) + self._deferred.num_open

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint("embeddings", EmbeddingsRequest, self.embeddings)]

    def embeddings(self, call: Call) -> None:
        """Endpoint `embeddings`: EmbeddingsRequest in, one Embedding for each input out, as they come."""
        guarded(call, lambda: self._embed(call))

    async def drain(self) -> None:
        """Wait until no call is open."""
        await self._deferred.drain()
        await self._idle.wait()

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        for inputs in list(self._open):
            inputs.end(stopping())
        await self._deferred.close()
        await self._idle.wait()

    def _embed(self, call: Call) -> None:
        request: EmbeddingsRequest = call.request
        if self._closed:
            raise stopping()
        embedding_inputs.check(request, self._models, self._max_model_len)
        found = embedding_inputs.inputs(request, self._tokenizer.num_ids)
        self._check_engines()
        texts = embedding_inputs.texts(request, found)

        def made(_: str, ids: Sequence[TokenBuffer]) -> None:
            known = dict(zip(texts, ids, strict=True))
            self._begin(
                call,
                embedding_inputs.encoded(
                    request, found, lambda text, special: known[TextPrompt(text, special)], self._max_model_len
                ),
            )

        if texts:
            self._prompts.texts(call, texts, made, param="input")
        else:
            made("", [])

    def _check_engines(self) -> None:
        """Before work is done for nothing; what no engine is known to say, the engine says."""
        lacking = self._shared.instances.cannot_embed(self._models[0])
        if lacking is not None:
            raise cannot_embed(lacking)

    def _begin(self, call: Call, encoded: Sequence[TokenBuffer]) -> None:
        inputs = _Inputs(call, encoded, self._start, self._done)
        self._open[inputs] = None
        self._idle.clear()
        inputs.start()

    def _start(self, call: "_InputCall") -> None:
        asked: EmbeddingsRequest = call.request
        request = GenerationRequest(
            model=self._models[0],
            prompt_ids=call.prompt_ids,
            # No engine keeps blocks of an input, so that none need be looked for.
            block_hashes=[],
            sampling=_ONE_TOKEN,
            stop_ids=(),
            priority=asked.priority or 0,
            cache_salt=asked.cache_salt,
        )
        _RoutedInput(call, request, self._output, self._shared, on_done=_nothing).start()

    def _done(self, inputs: "_Inputs") -> None:
        self._open.pop(inputs, None)
        if not self._open:
            self._idle.set()


class _RoutedInput(Generation):
    """An input on its way, as a request that generates: router, booking, second instance. Its one item is a vector."""

    def open_stream(self, attempt: Attempt, decision: RouteDecision, request: GenerationRequest) -> StreamHandle:
        asked: EmbeddingsRequest = self._call.request
        embed = EmbedRequest(
            request_id=self._call.context.request_id,
            prompt_ids=request.prompt_ids,
            dimensions=asked.dimensions,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        target = _embed_target(decision.addresses, decision.instance_id)
        return self._client.open(target, embed, TokenSink(attempt), context=self._context, item_type=Embedding)

    def on_tokens(self, instance_id: InstanceId, deltas: Sequence[Any]) -> None:
        attempt = self._attempt
        if attempt is not None:
            # Its stream ends by itself.
            attempt.started, attempt.stream = True, None
        self._release()
        self._call.items(deltas)
        self._call.end()


class _InputCall(PartCall):
    __slots__ = ("prompt_ids",)

    def __init__(self, call: Call, index: int, inputs: "_Inputs", prompt_ids: TokenBuffer) -> None:
        super().__init__(call, index, inputs.on_items, inputs.on_end)
        self.prompt_ids = prompt_ids


class _Inputs:
    """A request's inputs, INPUTS_AT_ONCE of them at a time. start: begins one. on_done: once nothing is open."""

    def __init__(
        self,
        call: Call,
        encoded: Sequence[TokenBuffer],
        start: Callable[[_InputCall], None],
        on_done: Callable[["_Inputs"], None],
    ) -> None:
        self._call = call
        self._start = start
        self._on_done = on_done
        self._waiting: Iterator[_InputCall] = (_InputCall(call, index, self, ids) for index, ids in enumerate(encoded))
        self._open: dict[_InputCall, None] = {}
        self._over = False

    def start(self) -> None:
        self._call.on_cancel(self._cancel)
        self._fill()

    def end(self, error: StatorError) -> None:
        """With a failure, if it has not ended."""
        if not self._over:
            self._cancel()
            self._call.end(error)

    def _fill(self) -> None:
        while not self._over and len(self._open) < INPUTS_AT_ONCE:
            following = next(self._waiting, None)
            if following is None:
                if not self._open:
                    self._over = True
                    self._on_done(self)
                    self._call.end()
                return
            self._open[following] = None
            self._start(following)

    def on_items(self, call: _InputCall, items: Sequence[Embedding]) -> None:
        """One: the vector."""
        if not self._over:
            self._call.items([msgspec.structs.replace(items[0], index=call.index)])

    def on_end(self, call: _InputCall, error: StatorError | None) -> None:
        self._open.pop(call, None)
        if error is not None:
            self.end(error)
        elif not self._over:
            self._fill()

    def _cancel(self) -> None:
        if self._over:
            return
        self._over = True
        for call in list(self._open):
            call.cancel()
        self._on_done(self)


def _nothing(_: Generation) -> None:
    pass
