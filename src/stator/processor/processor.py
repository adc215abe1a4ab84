"""The Processor: OpenAI requests in, text deltas out; tokens in between.

Push style: an endpoint returns at once and everything after happens in callbacks. Only a long prompt leaves the event
loop (`prompts`).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import msgspec

from stator.core.continuation import DEFAULT_WAIT_S
from stator.core.hashing import block_hashes
from stator.core.sequence_limits import lacks
from stator.errors import ErrorCode, StatorError
from stator.messages.openai import ChatCompletionRequest, CompletionRequest
from stator.messages.tokens import TokenBuffer, num_tokens, pack, unpack
from stator.processor import validation
from stator.processor.answer_form import (
    PLAIN_FORM,
    AnswerForm,
    AnswerForms,
    check_with_grammar,
    named_by,
    new_call_id,
)
from stator.processor.answer_options import AnswerOptions, answer_options
from stator.processor.booking import DEFAULT_ROUTER_WAIT_S, Bookings, RouterTarget
from stator.processor.chat_template import ChatTemplate
from stator.processor.choices import ChoiceCall, Choices
from stator.processor.deferred import DeferredWork, guarded, stopping
from stator.processor.details import Details, ShownPrompt
from stator.processor.embeddings import Embeddings
from stator.processor.feedback import RouteFeedback
from stator.processor.generation import Generation, GenerationRequest, Shared
from stator.processor.instances import DecodeInstances
from stator.processor.output import OutputText
from stator.processor.prompt_jobs import ChatPrompt, PromptMaker, TextPrompt
from stator.processor.prompt_length import tell_length
from stator.processor.prompts import PromptBounds, Prompts, prompt_pool
from stator.processor.served_names import ServedNames
from stator.processor.tokenization import Tokenization
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.validation import SamplingDefaults
from stator.runtime.directory import InstanceDirectory
from stator.transport.base import Call, Endpoint, TransportClient

MAX_WAITING = 64
"""Long texts that may wait at `tokenize` and `embeddings`, each; more are refused."""

_Then = Callable[[Call, Sequence[TokenBuffer]], None]


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """migration_limit: further instances a request may go on to after the first one fails it.

    migration_wait_s: how long a request with half an answer waits for an instance to go on to when none is left.
    router_wait_s: how long a request waits for a router when there is none.
    thread_chars: prompts of that many characters and more are tokenized on a thread (about 2 ms of work).
    pool_chars: prompts of that many are made by a process that is killed after prompt_timeout_s, as are those for which
    a request hands arguments to the model's template. prompt_processes: how many such there may be, with a tokenizer
    of their own each, which the first such prompt starts; 0 to do without.
    max_encoding: prompts that may wait for the thread or a process; more are refused.
    tool_parser, reasoning_parser, model_type: as `AnswerForms` takes them.
    """

    migration_limit: int = 3
    migration_wait_s: float = DEFAULT_WAIT_S
    router_wait_s: float = DEFAULT_ROUTER_WAIT_S
    thread_chars: int = 8192
    pool_chars: int = 262_144
    prompt_timeout_s: float = 10.0
    prompt_processes: int = 1
    max_encoding: int = 512
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    model_type: str = ""


class Processor:
    """Serves one model under one or more names; the first is the one that routing and block hashes use.

    block_size and max_model_len: tokens, as the workers have them. router: where `route` is. rng: draws the seeds of
    sampled requests that bring none. directory: tells of instances that left, and what each engine can resume; None:
    such things are learned from calls alone. Raises ConfigError for a chat template that does not compile.

    Items of `chat` and `completions` are CompletionDelta; see there for their order. Owns its open requests until
    `close`.
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
        directory: InstanceDirectory | None = None,
        settings: ProcessorSettings | None = None,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        self._models = tuple(model_names)
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._client = client
        self._settings = settings = settings or ProcessorSettings()
        self._bookings = Bookings(router, rng, directory, wait_s=settings.router_wait_s)
        self._feedback = RouteFeedback(client)
        self._instances = DecodeInstances(directory)
        self._shared = Shared(
            client,
            self._bookings,
            self._feedback,
            self._instances,
            settings.migration_limit,
            settings.migration_wait_s,
        )
        self._rng = rng
        self._defaults = defaults or SamplingDefaults()
        self._chat_template: ChatTemplate | None = None
        if tokenizer.chat_template is not None:
            source, origin = tokenizer.chat_template
            self._chat_template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)
        self._names = ServedNames(self._models, self._instances)
        self._pool = prompt_pool(tokenizer.directory, settings.prompt_processes)
        # Kinds of requests do not wait for each other's long texts.
        self._encoding = DeferredWork("tokenize", max_waiting=settings.max_encoding, what="long prompts")
        for_embeddings = DeferredWork("tokenize-embeddings", max_waiting=MAX_WAITING, what="requests with long texts")
        for_tokenization = DeferredWork("tokenize-only", max_waiting=MAX_WAITING, what="long texts")
        self._prompts = self._prompts_with(self._encoding)
        self._embeddings = Embeddings(
            models=self._models,
            tokenizer=tokenizer,
            max_model_len=max_model_len,
            shared=self._shared,
            prompts=self._prompts_with(for_embeddings),
            deferred=for_embeddings,
        )
        self._forms = AnswerForms(
            tokenizer,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
            model_type=settings.model_type,
        )
        self._tokenization = Tokenization(
            models=self._names,
            tokenizer=tokenizer,
            has_chat_template=self._chat_template is not None,
            forms=self._forms,
            max_model_len=max_model_len,
            prompts=self._prompts_with(for_tokenization),
            deferred=for_tokenization,
        )
        self._new_call_id = new_call_id(rng.getrandbits)
        self._open: dict[Generation, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def num_open(self) -> int:
        """Requests accepted and not ended."""
        return len(self._open) + self._encoding.num_open + self._tokenization.num_open + self._embeddings.num_open

    def _prompts_with(self, deferred: DeferredWork) -> Prompts:
        settings = self._settings
        bounds = PromptBounds(settings.thread_chars, settings.pool_chars, settings.prompt_timeout_s)
        return Prompts(PromptMaker(self._tokenizer, self._chat_template), self._pool, bounds, deferred)

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("chat", ChatCompletionRequest, self.chat),
            Endpoint("completions", CompletionRequest, self.completions),
            Endpoint("count_tokens", ChatCompletionRequest, self.count_tokens),
            *self._tokenization.endpoints(),
            *self._embeddings.endpoints(),
        ]

    def chat(self, call: Call) -> None:
        """Endpoint `chat`: ChatCompletionRequest in, CompletionDelta out."""
        guarded(call, lambda: self._chat(call))

    def completions(self, call: Call) -> None:
        """Endpoint `completions`: CompletionRequest in, CompletionDelta out."""
        guarded(call, lambda: self._completions(call))

    def count_tokens(self, call: Call) -> None:
        """Endpoint `count_tokens`: as `chat`, but all that comes is one delta, whose usage has the prompt's length."""
        guarded(call, lambda: self._chat(call, then=tell_length))

    def tokenize(self, call: Call) -> None:
        """Endpoint `tokenize`: TokenizeRequest in, one Tokenized out."""
        self._tokenization.tokenize(call)

    def detokenize(self, call: Call) -> None:
        """Endpoint `detokenize`: DetokenizeRequest in, one Detokenized out."""
        self._tokenization.detokenize(call)

    def embeddings(self, call: Call) -> None:
        """Endpoint `embeddings`: EmbeddingsRequest in, one Embedding for each input out."""
        self._embeddings.embeddings(call)

    async def drain(self) -> None:
        """Wait until no request is open. The caller bounds the wait and first stops new ones."""
        await self._encoding.drain()
        await self._idle.wait()
        await self._tokenization.drain()
        await self._embeddings.drain()

    async def close(self) -> None:
        """End every open request with DRAINING. Idempotent."""
        self._closed = True
        for generation in list(self._open):
            generation.end(stopping())
        if self._pool is not None:
            await self._pool.close()
        await self._embeddings.close()
        self._feedback.close()
        self._bookings.close()
        self._instances.close()
        await self._tokenization.close()
        await self._encoding.close()
        await self._idle.wait()

    # From the call to its prompt

    def _chat(self, call: Call, then: _Then | None = None) -> None:
        request: ChatCompletionRequest = call.request
        self._check(request)
        if self._chat_template is None:
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                f"The model {self._models[0]!r} has no chat template; use /v1/completions with a plain prompt.",
                param="messages",
            )
        form = self._forms.of_chat(request)
        chat = ChatPrompt(request.messages)
        if form is not PLAIN_FORM:
            chat = ChatPrompt(request.messages, list(form.tools.definitions), form.template_arguments)

        def made(text: str, encoded: Sequence[TokenBuffer]) -> None:
            if then is None:
                self._generate(call, request, form, [text], encoded)
            else:
                then(call, encoded)

        # The template writes the special tokens; adding them again would double the first.
        self._prompts.chat(call, chat, made, add_special_tokens=False)

    def _completions(self, call: Call) -> None:
        request: CompletionRequest = call.request
        self._check(request)
        form = self._forms.of_completion(request)
        prompts = validation.prompts(request, self._tokenizer.num_ids)

        def made(_: str, encoded: Sequence[TokenBuffer]) -> None:
            self._generate(call, request, form, prompts, encoded)

        texts = [TextPrompt(prompt, True) for prompt in prompts if isinstance(prompt, str)]
        if texts:
            self._prompts.texts(call, texts, made, param="prompt")
        else:
            made("", [pack(prompt) for prompt in prompts if not isinstance(prompt, str)])

    def _check(self, request: validation.Request) -> None:
        if self._closed:
            raise stopping()
        validation.check_model(request, self._names)
        validation.check_supported(request)
        validation.check_ranges(request)
        validation.stop_strings(request)
        validation.stop_token_ids(request, self._tokenizer.num_ids)

    # From the prompts to the stream

    def _generate(
        self,
        call: Call,
        request: validation.Request,
        form: AnswerForm,
        prompts: Sequence[str | list[int]],
        encoded: Sequence[TokenBuffer],
    ) -> None:
        options = answer_options(request)
        if len(encoded) == 1 and options.n == 1 and not options.has_details and not form.is_read:
            made = self._generation_request(request, form, prompts[0], encoded[0], options)
            self._start(call, made, options, form, None)
            return
        # All of them, so that a prompt that is refused is so before anything is computed.
        requests = [
            self._generation_request(request, form, prompt, ids, options)
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]

        def start(choice: ChoiceCall) -> None:
            number, nth = divmod(choice.index, options.n)
            made = requests[number]
            sampling = validation.for_choice(made.sampling, nth)
            scores = sampling.prompt_logprobs is not None
            if scores and nth:
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
            details = None
            if options.has_details or form.is_read:
                prompt = prompts[number]
                shown = self._shown_prompt(prompt, made.prompt_ids, options, asks_scores=scores and not nth)
                reader = form.reader(prompt, self._new_call_id) if isinstance(prompt, str) else None
                details = Details(options, self._tokenizer, shown, reader)
            self._start(choice, replace(made, sampling=sampling), options, form, details)

        shared = any(each.block_hashes or each.sampling.prompt_logprobs is not None for each in requests)
        choices = Choices(
            call,
            num_prompts=len(requests),
            n=options.n,
            start=start,
            together=not shared,
            continuous_usage=options.continuous_usage,
        )
        choices.start()

    def _shown_prompt(
        self, prompt: str | list[int], prompt_ids: TokenBuffer, options: AnswerOptions, *, asks_scores: bool
    ) -> ShownPrompt:
        ids = unpack(prompt_ids)
        text = ""
        if options.echo:
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
        return ShownPrompt(ids, text, asks_scores)

    def _start(
        self,
        call: Call | ChoiceCall,
        request: GenerationRequest,
        options: AnswerOptions,
        form: AnswerForm,
        details: Details | None,
    ) -> None:
        output = OutputText(
            self._tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens, shown_ids=form.shown_ids),
            request.stops,
            min_tokens=request.sampling.min_tokens,
            stop_ids=request.stop_ids,
        )
        generation = Generation(call, request, output, self._shared, on_done=self._done, details=details)
        self._open[generation] = None
        self._idle.clear()
        generation.start()

    def _generation_request(
        self,
        request: validation.Request,
        form: AnswerForm,
        prompt: str | list[int],
        prompt_ids: TokenBuffer,
        options: AnswerOptions,
    ) -> GenerationRequest:
        num_ids, eos_ids = self._tokenizer.num_ids, self._tokenizer.eos_ids
        max_tokens = validation.resolve_max_tokens(request, num_tokens(prompt_ids), self._max_model_len)
        stop_ids = validation.stop_token_ids(request, num_ids)
        sampling = validation.sampling_params(
            request,
            defaults=self._defaults,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            draw_seed=lambda: self._rng.getrandbits(63),
            bias=validation.logit_bias(request, num_ids),
            allowed_ids=validation.allowed_token_ids(request, num_ids, eos_ids.union(stop_ids)),
            num_top=options.num_top,
            num_prompt_top=options.num_prompt_top,
            grammar=None if form is PLAIN_FORM else form.grammar(prompt if isinstance(prompt, str) else ""),
        )
        if sampling.grammar is not None:
            check_with_grammar(request, form.param)
        model, lora_name = self._models[0], self._names.adapter(request.model)
        lacking = self._instances.lacking(model, sampling)
        if lacking is not None:
            raise named_by(lacks(*lacking), form.param)
        return GenerationRequest(
            model=model,
            prompt_ids=prompt_ids,
            block_hashes=block_hashes(
                prompt_ids, self._block_size, model=model, lora_name=lora_name, cache_salt=request.cache_salt
            ),
            sampling=sampling,
            stop_ids=frozenset(stop_ids) if request.ignore_eos else eos_ids.union(stop_ids),
            stops=validation.stop_strings(request),
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
            grammar_param=form.param,
            lora_name=lora_name,
        )

    def _done(self, generation: Generation) -> None:
        self._open.pop(generation, None)
        if not self._open:
            self._idle.set()
