"""Endpoints `tokenize` and `detokenize`: a prompt's tokens and back, without an engine.

Short texts are done at once; long ones elsewhere, so that they hold up neither the event loop nor the prompts of
requests that generate.
"""

from collections.abc import Callable, Sequence
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
from stator.messages.tokens import TokenBuffer, num_tokens, unpack
from stator.processor.answer_form import AnswerForms
from stator.processor.deferred import DeferredWork, guarded, stopping
from stator.processor.prompt_jobs import ChatPrompt, TextPrompt
from stator.processor.prompts import Prompts
from stator.processor.tokenizer import ModelTokenizer
from stator.transport.base import Call, Endpoint

THREAD_TOKENS = 2048
"""Lists of that many token ids and more are turned into text on the thread."""

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Of an answer's text, UTF-8: a few bytes of a request can name a token that spells a hundred."""


class Tokenization:
    """max_model_len: told with each answer. has_chat_template: whether there is one to render messages with.

    prompts, deferred: as `prompts.Prompts` has them. Owns its open calls until `close`, which ends them with DRAINING.
    """

    def __init__(
        self,
        *,
        models: Sequence[str],
        tokenizer: ModelTokenizer,
        has_chat_template: bool,
        forms: AnswerForms,
        max_model_len: int,
        prompts: Prompts,
        deferred: DeferredWork,
    ) -> None:
        self._models = models
        self._tokenizer = tokenizer
        self._has_chat_template = has_chat_template
        self._forms = forms
        self._max_model_len = max_model_len
        self._prompts = prompts
        self._deferred = deferred
        self._closed = False

    @property
    def num_open(self) -> int:
        return self._deferred.num_open

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("tokenize", TokenizeRequest, self.tokenize),
            Endpoint("detokenize", DetokenizeRequest, self.detokenize),
        ]

    def tokenize(self, call: Call) -> None:
        """Endpoint `tokenize`: TokenizeRequest in, one Tokenized out."""
        guarded(call, lambda: self._tokenize(call))

    def detokenize(self, call: Call) -> None:
        """Endpoint `detokenize`: DetokenizeRequest in, one Detokenized out."""
        guarded(call, lambda: self._detokenize(call))

    async def drain(self) -> None:
        """Wait until no call is open."""
        await self._deferred.drain()

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        await self._deferred.close()

    def _tokenize(self, call: Call) -> None:
        request: TokenizeRequest = call.request
        self._check_model(request.model)
        prompt, param = self._prompt(request)

        def made(_: str, ids: Sequence[TokenBuffer]) -> None:
            (tokens,) = ids
            if num_tokens(tokens) > MAX_TOKENS:
                raise _invalid(
                    param, f"{param} has {num_tokens(tokens)} tokens, more than the {MAX_TOKENS} that may be asked"
                )
            if request.return_token_strs and num_tokens(tokens) >= THREAD_TOKENS:
                self._deferred.on_thread(call, lambda: self._tokenized(request, tokens, param), _answer(call))
            else:
                _answer(call)(self._tokenized(request, tokens, param))

        if isinstance(prompt, ChatPrompt):
            special = request.add_special_tokens is True
            self._prompts.chat(call, prompt, made, add_special_tokens=special, param=param)
        else:
            special = request.add_special_tokens is not False
            self._prompts.texts(call, [TextPrompt(prompt, special)], made, param=param)

    def _detokenize(self, call: Call) -> None:
        request: DetokenizeRequest = call.request
        self._check_model(request.model)
        self._check_tokens(request.tokens)
        if len(request.tokens) >= THREAD_TOKENS:
            self._deferred.on_thread(call, lambda: self._detokenized(request.tokens), _answer(call))
        else:
            _answer(call)(self._detokenized(request.tokens))

    def _check_model(self, model: str | None) -> None:
        if self._closed:
            raise stopping()
        if model is not None and model not in self._models:
            raise StatorError(
                ErrorCode.MODEL_NOT_FOUND,
                f"The model {model!r} does not exist. Models served here: {', '.join(self._models)}.",
                param="model",
            )

    def _prompt(self, request: TokenizeRequest) -> tuple[str | ChatPrompt, str]:
        """And the field that it is from."""
        name = unsupported_field(request)
        if name is not None:
            raise StatorError(ErrorCode.UNSUPPORTED, f"{name} is not supported: leave it out.", param=name)
        if request.messages is None:
            if request.prompt is None:
                raise _invalid("prompt", "Missing required field: 'prompt', or 'messages'.")
            for name in ("tools", "chat_template_kwargs"):
                if getattr(request, name):
                    raise _invalid(name, f"{name} needs messages: a prompt is taken as it is")
            return request.prompt, "prompt"
        if request.prompt is not None:
            raise _invalid("prompt", "prompt and messages may not be given together; leave out one of the two")
        if request.continue_final_message and request.add_generation_prompt:
            raise _invalid(
                "continue_final_message",
                "continue_final_message needs add_generation_prompt to be false: the one goes on with a message, the "
                "other begins a new one",
            )
        if not self._has_chat_template:
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
        chat = ChatPrompt(
            request.messages,
            list(form.tools.definitions),
            form.template_arguments,
            request.add_generation_prompt,
            request.continue_final_message,
        )
        return chat, "messages"

    def _tokenized(self, request: TokenizeRequest, tokens: TokenBuffer, param: str) -> Tokenized:
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


def _answer(call: Call) -> Callable[[Any], None]:
    def answer(item: Any) -> None:
        call.items([item])
        call.end()

    return answer
