"""The Processor: OpenAI requests in, text deltas out; tokens in between.

Push style: an endpoint returns at once and everything after happens in callbacks. Only a long prompt leaves the event
loop, to be tokenized on a thread.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

from stator.core.hashing import block_hashes
from stator.errors import ErrorCode, StatorError
from stator.messages.openai import ChatCompletionRequest, CompletionRequest
from stator.messages.tokens import TokenBuffer, num_tokens, pack
from stator.processor import validation
from stator.processor.chat_template import ChatTemplate
from stator.processor.feedback import RouteFeedback
from stator.processor.generation import Generation, GenerationRequest, RouterTarget
from stator.processor.output import OutputText
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.validation import SamplingDefaults
from stator.transport.base import Call, Endpoint, TransportClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """migration_limit: further instances a request may go on to after the first one fails it.

    thread_chars: prompts of that many characters and more are tokenized on a thread (about 2 ms of work).
    """

    migration_limit: int = 3
    thread_chars: int = 8192


class Processor:
    """Serves one model under one or more names; the first is the one that routing and block hashes use.

    block_size and max_model_len: tokens, as the workers have them. router: where `route` is. rng: draws the seeds of
    sampled requests that bring none. Raises ConfigError for a chat template that does not compile.

    Items of both endpoints are CompletionDelta; see there for their order. Owns its open requests until `close`.
    """

    def __init__(
        self,
        *,
        model_names: Sequence[str],
        tokenizer: ModelTokenizer,
        block_size: int,
        max_model_len: int,
        client: TransportClient,
        router: RouterTarget,
        rng: Random,
        settings: ProcessorSettings | None = None,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        self._models = tuple(model_names)
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._client = client
        self._router = router
        self._feedback = RouteFeedback(client)
        self._rng = rng
        self._settings = settings or ProcessorSettings()
        self._defaults = defaults or SamplingDefaults()
        self._chat_template: ChatTemplate | None = None
        if tokenizer.chat_template is not None:
            source, origin = tokenizer.chat_template
            self._chat_template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._open: set[Generation] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_encoding = 0
        self._closed = False

    @property
    def num_open(self) -> int:
        """Requests accepted and not ended."""
        return len(self._open) + self._num_encoding

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("chat", ChatCompletionRequest, self.chat),
            Endpoint("completions", CompletionRequest, self.completions),
        ]

    def chat(self, call: Call) -> None:
        """Endpoint `chat`: ChatCompletionRequest in, CompletionDelta out."""
        self._guard(call, lambda: self._chat(call))

    def completions(self, call: Call) -> None:
        """Endpoint `completions`: CompletionRequest in, CompletionDelta out."""
        self._guard(call, lambda: self._completions(call))

    async def drain(self) -> None:
        """Wait until no request is open. The caller bounds the wait and first stops new ones."""
        await self._idle.wait()

    async def close(self) -> None:
        """End every open request with DRAINING. Idempotent."""
        self._closed = True
        for generation in list(self._open):
            generation.end(_stopping())
        self._feedback.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        await self._idle.wait()

    # From the call to its prompt

    def _guard(self, call: Call, step: Callable[[], None]) -> None:
        """The edge of a request: whatever goes wrong in a step ends the call."""
        try:
            step()
        except StatorError as error:
            call.end(error)
        except Exception:
            logger.exception("request %s failed in the processor", call.context.request_id)
            call.end(StatorError(ErrorCode.INTERNAL, "the processor failed; its log has the reason"))

    def _chat(self, call: Call) -> None:
        request: ChatCompletionRequest = call.request
        self._check(request)
        if self._chat_template is None:
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                f"The model {self._models[0]!r} has no chat template; use /v1/completions with a plain prompt.",
                param="messages",
            )
        text = self._chat_template.render(request.messages)
        # The template wrote the special tokens; adding them again would double the first.
        self._encode(call, request, text, add_special_tokens=False)

    def _completions(self, call: Call) -> None:
        request: CompletionRequest = call.request
        self._check(request)
        prompt = validation.single_prompt(request, self._tokenizer.num_ids)
        if isinstance(prompt, str):
            self._encode(call, request, prompt, add_special_tokens=True)
        else:
            self._generate(call, request, pack(prompt))

    def _check(self, request: validation.Request) -> None:
        if self._closed:
            raise _stopping()
        validation.check_model(request, self._models)
        validation.check_supported(request)
        validation.check_ranges(request)
        validation.stop_strings(request)
        validation.stop_token_ids(request, self._tokenizer.num_ids)

    def _encode(self, call: Call, request: validation.Request, text: str, *, add_special_tokens: bool) -> None:
        def encode() -> TokenBuffer:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if len(text) < self._settings.thread_chars:
            self._generate(call, request, encode())
            return

        def encoded(future: "asyncio.Future[TokenBuffer]") -> None:
            self._num_encoding -= 1
            if not call.cancelled:
                result = _stopping() if self._closed or future.cancelled() else future.exception()
                self._guard(call, lambda: self._generate_or_raise(call, request, result or future.result()))
            self._set_idle()

        self._num_encoding += 1
        self._idle.clear()
        asyncio.get_running_loop().run_in_executor(self._threads, encode).add_done_callback(encoded)

    def _generate_or_raise(self, call: Call, request: validation.Request, prompt: TokenBuffer | BaseException) -> None:
        if isinstance(prompt, BaseException):
            raise prompt
        self._generate(call, request, prompt)

    # From the prompt to the stream

    def _generate(self, call: Call, request: validation.Request, prompt_ids: TokenBuffer) -> None:
        generation_request = self._generation_request(request, prompt_ids)
        output = OutputText(
            self._tokenizer.detokenizer(),
            validation.stop_strings(request),
            min_tokens=generation_request.sampling.min_tokens,
            stop_ids=generation_request.stop_ids,
        )
        generation = Generation(
            call,
            generation_request,
            output,
            client=self._client,
            router=self._router,
            feedback=self._feedback,
            migration_limit=self._settings.migration_limit,
            on_done=self._done,
        )
        self._open.add(generation)
        self._idle.clear()
        generation.start()

    def _generation_request(self, request: validation.Request, prompt_ids: TokenBuffer) -> GenerationRequest:
        max_tokens = validation.resolve_max_tokens(request, num_tokens(prompt_ids), self._max_model_len)
        stop_ids = validation.stop_token_ids(request, self._tokenizer.num_ids)
        sampling = validation.sampling_params(
            request,
            defaults=self._defaults,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            draw_seed=lambda: self._rng.getrandbits(63),
        )
        hashes = block_hashes(prompt_ids, self._block_size, model=self._models[0], cache_salt=request.cache_salt)
        return GenerationRequest(
            model=self._models[0],
            prompt_ids=prompt_ids,
            block_hashes=hashes,
            sampling=sampling,
            stop_ids=frozenset(stop_ids) if request.ignore_eos else self._tokenizer.eos_ids.union(stop_ids),
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
        )

    def _done(self, generation: Generation) -> None:
        self._open.discard(generation)
        self._set_idle()

    def _set_idle(self) -> None:
        if not self._open and not self._num_encoding:
            self._idle.set()


def _stopping() -> StatorError:
    return StatorError(ErrorCode.DRAINING, "this processor is stopping; send the request again")
