"""Where a prompt is made: at once, on a thread, or in a process that can be killed.

A short one is made at once, and one of some thousand characters tokenized on a thread, which takes milliseconds. What
may take longer than anybody foresaw goes to a process with a deadline: a very long conversation, and what a request
hands to the model's template of its own.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.messages.tokens import TokenBuffer
from stator.processor.deferred import DeferredWork, stopping
from stator.processor.prompt_jobs import ChatPrompt, Prepared, PromptJob, PromptMaker, TextPrompt
from stator.runtime.killable import JobKilled, JobTooLong, KillablePool, PoolUnavailable
from stator.transport.base import Call

Then = Callable[[str, list[TokenBuffer]], None]
"""With the rendered text, empty if texts were given, and the tokens of each text."""

POOL_BYTES = 4 << 30
_prepared = msgspec.msgpack.Decoder(Prepared)


@dataclass(frozen=True, slots=True)
class PromptBounds:
    """thread_chars: prompts of that many characters and more are tokenized on a thread. pool_chars: made by a process
    of the pool. timeout_s: which is killed when one takes longer."""

    thread_chars: int
    pool_chars: int
    timeout_s: float


def prompt_pool(model_dir: Path | None, max_processes: int) -> KillablePool | None:
    """None for a tokenizer that is from no directory, which no other process could load."""
    if model_dir is None or max_processes < 1:
        return None
    command = (sys.executable, "-m", "stator.processor.prompt_child", str(model_dir))
    return KillablePool("the process for long prompts", command, max_processes=max_processes, max_bytes=POOL_BYTES)


class Prompts:
    """Makes the prompts of one kind of requests, one after the other, with a thread of its own for the longer ones.

    pool: None to do everything here. deferred: owns the calls that wait; closed by whoever made it, after the pool.
    """

    def __init__(
        self, maker: PromptMaker, pool: KillablePool | None, bounds: PromptBounds, deferred: DeferredWork
    ) -> None:
        self._maker = maker
        self._pool = pool
        self._bounds = bounds
        self._deferred = deferred

    def chat(
        self, call: Call, chat: ChatPrompt, then: Then, *, add_special_tokens: bool = False, param: str = "messages"
    ) -> None:
        """param: the field that the prompt is from, for errors. Raises StatorError, as a step of the call does; what
        fails later ends the call."""
        if self._pool is not None and (chat.arguments or chat.num_chars() >= self._bounds.pool_chars):
            job = PromptJob(chat, add_special_tokens=add_special_tokens)
            self._in_pool(self._pool, call, job, then, param)
            return
        text = self._maker.render(chat)
        # What the template makes of a conversation may be long where that was not.
        self.texts(call, [TextPrompt(text, add_special_tokens)], lambda _, ids: then(text, ids), param=param)

    def texts(self, call: Call, texts: Sequence[TextPrompt], then: Then, *, param: str) -> None:
        """As `chat`."""
        num_chars = sum(len(each.text) for each in texts)
        if num_chars < self._bounds.thread_chars:
            then("", self._encode(texts, param))
        elif self._pool is None or num_chars < self._bounds.pool_chars:
            self._deferred.on_thread(call, lambda: self._encode(texts, param), lambda ids: then("", ids))
        else:
            self._in_pool(self._pool, call, PromptJob(texts=list(texts)), then, param)

    def _encode(self, texts: Sequence[TextPrompt], param: str) -> list[TokenBuffer]:
        try:
            return self._maker.encode(texts)
        except StatorError as error:
            raise _of_field(error, param) from error

    def _in_pool(self, pool: KillablePool, call: Call, job: PromptJob, then: Then, param: str) -> None:
        self._deferred.check_room()
        try:
            payload = msgspec.msgpack.encode(job)
        except UnicodeEncodeError:
            raise StatorError(
                ErrorCode.INVALID_REQUEST, f"{param} contains what is not valid Unicode text", param=param
            ) from None

        def done(answer: bytes) -> None:
            prepared = _prepared.decode(answer)
            if prepared.error is not None:
                raise _of_field(prepared.error.to_error(), param)
            then(prepared.text, [TokenBuffer(ids) for ids in prepared.ids])

        def failure(error: BaseException) -> BaseException:
            if isinstance(error, JobTooLong):
                message = (
                    f"{param}: making the prompt took longer than {self._bounds.timeout_s:g} seconds and was given up; "
                    "send a shorter one"
                )
            elif isinstance(error, JobKilled):
                message = f"{param}: making the prompt took more than a process may use; send a shorter one"
            elif isinstance(error, PoolUnavailable) and pool.closed:
                return stopping()
            else:
                return error
            return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)

        waiting = pool.submit(payload, self._bounds.timeout_s, wanted=lambda: not call.cancelled)
        self._deferred.follow(call, waiting, done, failure)


def _of_field(error: StatorError, param: str) -> StatorError:
    """A tokenizer does not know what its text is from."""
    if error.param is not None:
        return error
    return StatorError(error.code, error.message, param=param, retry_after_s=error.retry_after_s)
