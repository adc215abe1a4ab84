"""Endpoints `tokenize` and `detokenize`: a prompt's tokens and back, without an engine.

Short texts are done at once; long ones on a thread of their own, so that they hold up neither the event loop nor the
prompts of requests that generate.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.messages.openai import ChatCompletionRequest
from stator.messages.tokenize import (
    MAX_TOKENS,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    unsupported_field,
)
from stator.messages.tokens import num_tokens, unpack
from stator.processor.answer_form import AnswerForms
from stator.processor.chat_template import ChatTemplate
from stator.processor.tokenizer import ModelTokenizer
from stator.transport.base import Call, Endpoint

logger = logging.getLogger(__name__)

THREAD_TOKENS = 2048
"""Lists of that many token ids and more are turned into text on the thread."""

MAX_WAITING = 64
"""Long texts that may wait for the thread; more are refused."""

RETRY_AFTER_S = 2.0
MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Of an answer's text, UTF-8: a few bytes of a request can name a token that spells a hundred."""


class Tokenization:
    """max_model_len: told with each answer. thread_chars: texts of that many characters and more go to the thread.

    Owns its open calls until `close`, which ends them with DRAINING.
    """

    def __init__(
        self,
        *,
        models: tuple[str, ...],
        tokenizer: ModelTokenizer,
        chat_template: ChatTemplate | None,
        forms: AnswerForms,
        max_model_len: int,
        thread_chars: int,
    ) -> None:
        self._models = models
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._forms = forms
        self._max_model_len = max_model_len
        self._thread_chars = thread_chars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize-only")
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_open = 0
        self._closed = False

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("tokenize", TokenizeRequest, self.tokenize),
            Endpoint("detokenize", DetokenizeRequest, self.detokenize),
        ]

    def tokenize(self, call: Call) -> None:
        """Endpoint `tokenize`: TokenizeRequest in, one Tokenized out."""
        request: TokenizeRequest = call.request

        def prepare() -> tuple[Callable[[], Tokenized], bool]:
            self._check_model(request.model)
            text, special, param = self._text(request)
            return lambda: self._tokenized(request, text, special, param), len(text) >= self._thread_chars

        self._answer(call, prepare)

    def detokenize(self, call: Call) -> None:
        """Endpoint `detokenize`: DetokenizeRequest in, one Detokenized out."""
        request: DetokenizeRequest = call.request

        def prepare() -> tuple[Callable[[], Detokenized], bool]:
            self._check_model(request.model)
            self._check_tokens(request.tokens)
            return lambda: self._detokenized(request.tokens), len(request.tokens) >= THREAD_TOKENS

        self._answer(call, prepare)

    async def drain(self) -> None:
        """Wait until no call is open."""
        await self._idle.wait()

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        await self._idle.wait()

    def _answer(self, call: Call, prepare: Callable[[], tuple[Callable[[], Any], bool]]) -> None:
        """prepare: checks the request; what is left to do, and whether it belongs on the thread."""
        try:
            if self._closed:
                raise _stopping()
            work, is_long = prepare()
            if not is_long:
                call.items([work()])
                call.end()
                return
            if self.num_open >= MAX_WAITING:
                message = f"{self.num_open} long texts wait to be tokenized, as many as may; try again later"
                raise StatorError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)
        except Exception as error:
            self._fail(call, error)
            return

        def done(future: "asyncio.Future[Any]") -> None:
            self.num_open -= 1
            if not self.num_open:
                self._idle.set()
            if call.cancelled:
                return
            if future.cancelled() or (self._closed and future.exception() is not None):
                call.end(_stopping())
            elif (error := future.exception()) is not None:
                self._fail(call, error)
            else:
                call.items([future.result()])
                call.end()

        self.num_open += 1
        self._idle.clear()
        # A caller that left while its text waited costs nothing more.
        waiting = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None if call.cancelled else work())
        waiting.add_done_callback(done)

    def _fail(self, call: Call, error: BaseException) -> None:
        if isinstance(error, StatorError):
            call.end(error)
            return
        logger.error("request %s failed in the processor", call.context.request_id, exc_info=error)
        call.end(StatorError(ErrorCode.INTERNAL, "the processor failed; its log has the reason"))

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self._models:
            raise StatorError(
                ErrorCode.MODEL_NOT_FOUND,
                f"The model {model!r} does not exist. Models served here: {', '.join(self._models)}.",
                param="model",
            )

    def _text(self, request: TokenizeRequest) -> tuple[str, bool, str]:
        """The text, whether special tokens are added to it, and the field that it is from."""
        name = unsupported_field(request)
        if name is not None:
            raise StatorError(ErrorCode.UNSUPPORTED, f"{name} is not supported: leave it out.", param=name)
        if request.messages is None:
            if request.prompt is None:
                raise _invalid("prompt", "Missing required field: 'prompt', or 'messages'.")
            for name in ("tools", "chat_template_kwargs"):
                if getattr(request, name):
                    raise _invalid(name, f"{name} needs messages: a prompt is taken as it is")
            return request.prompt, request.add_special_tokens is not False, "prompt"
        if request.prompt is not None:
            raise _invalid("prompt", "prompt and messages may not be given together; leave out one of the two")
        if request.continue_final_message and request.add_generation_prompt:
            raise _invalid(
                "continue_final_message",
                "continue_final_message needs add_generation_prompt to be false: the one goes on with a message, the "
                "other begins a new one",
            )
        if self._chat_template is None:
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                f"The model {self._models[0]!r} has no chat template; send a prompt instead.",
                param="messages",
            )
        # As the prompt of a chat has them; whether the model's calls can be read does not matter here.
        form = self._forms.of_chat(
            ChatCompletionRequest(
                model=self._models[0],
                messages=request.messages,
                tools=request.tools,
                tool_choice="none",
                chat_template_kwargs=request.chat_template_kwargs,
            )
        )
        text = self._chat_template.render(
            request.messages,
            tools=form.tools.definitions,
            arguments=form.template_arguments,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        return text, request.add_special_tokens is True, "messages"

    def _tokenized(self, request: TokenizeRequest, text: str, special: bool, param: str) -> Tokenized:
        try:
            tokens = self._tokenizer.encode(text, add_special_tokens=special)
        except StatorError as error:
            raise _invalid(param, error.message) from error
        if num_tokens(tokens) > MAX_TOKENS:
            raise _invalid(
                param, f"{param} has {num_tokens(tokens)} tokens, more than the {MAX_TOKENS} that may be asked"
            )
        strings = None
        if request.return_token_strs:
            strings = self._tokenizer.strings(unpack(tokens))
            _check_size(sum(map(len, strings)), param)
        return Tokenized(tokens, self._max_model_len, strings)

    def _check_tokens(self, tokens: list[int]) -> None:
        if len(tokens) > MAX_TOKENS:
            raise _invalid("tokens", f"tokens takes at most {MAX_TOKENS} ids, not {len(tokens)}")
        num_ids = self._tokenizer.num_ids
        if tokens and max(tokens) >= num_ids:
            wrong = next(token_id for token_id in tokens if token_id >= num_ids)
            raise _invalid("tokens", f"tokens: token id {wrong} is not in the vocabulary (0 to {num_ids - 1})")

    def _detokenized(self, tokens: list[int]) -> Detokenized:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        _check_size(len(text.encode()), "tokens")
        return Detokenized(text)


def _check_size(num_bytes: int, param: str) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise _invalid(param, f"{param}: the answer would be longer than {MAX_TEXT_BYTES} bytes; send it in parts")


def _invalid(param: str, message: str) -> StatorError:
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)


def _stopping() -> StatorError:
    return StatorError(ErrorCode.DRAINING, "this processor is stopping; send the request again")
