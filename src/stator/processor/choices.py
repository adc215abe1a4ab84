"""Several answers to one request: n choices of each prompt, each a sub-request of its own.

A choice is routed, computed and, if its instance fails, continued by itself. The first choice of a prompt goes ahead:
the others begin when it has its first token, and find the prompt's blocks in that instance's prefix cache. What one
choice fails of ends the request. Usage counts each prompt once, and what was cached of it is what its first choice
found.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from stator.errors import StatorError
from stator.messages.openai import PromptTokensDetails, Usage
from stator.messages.processor import CompletionDelta, PromptDetails
from stator.processor.deferred import guarded
from stator.processor.part_call import PartCall
from stator.transport.base import Call

Start = Callable[["ChoiceCall"], None]
"""Begins to answer one choice. May raise StatorError."""


class ChoiceCall(PartCall):
    """usage: the last that was told of it."""

    __slots__ = ("usage",)

    def __init__(self, call: Call, index: int, choices: "Choices") -> None:
        super().__init__(call, index, choices.on_items, choices.on_end)
        self.usage: Usage | None = None


class Choices:
    """n: of each prompt; choices are numbered prompt by prompt. start: begins one. together: all at once, where there
    is nothing of a prompt to share. continuous_usage: as asked."""

    def __init__(
        self, call: Call, *, num_prompts: int, n: int, start: Start, together: bool, continuous_usage: bool
    ) -> None:
        self._call = call
        self._n = n
        self._start = start
        self._continuous_usage = continuous_usage
        self._choices = [ChoiceCall(call, index, self) for index in range(num_prompts * n)]
        self._begun = [False] * len(self._choices)
        self._together = together
        self._prompts: list[PromptDetails | None] = [None] * num_prompts
        self._num_open = len(self._choices)
        self._over = False

    def start(self) -> None:
        self._call.on_cancel(self._cancel)
        for choice in self._choices:
            if self._together or choice.index % self._n == 0:
                self._begin(choice)

    def _begin(self, choice: ChoiceCall) -> None:
        if self._over or self._begun[choice.index]:
            return
        self._begun[choice.index] = True
        guarded(choice, lambda: self._start(choice))

    def on_items(self, choice: ChoiceCall, items: Sequence[CompletionDelta]) -> None:
        if self._over:
            return
        self._call.items([self._of_choice(choice, delta) for delta in items])
        prompt, nth = divmod(choice.index, self._n)
        if nth == 0 and not self._together:
            for other in self._choices[prompt * self._n + 1 : (prompt + 1) * self._n]:
                self._begin(other)

    def _of_choice(self, choice: ChoiceCall, delta: CompletionDelta) -> CompletionDelta:
        prompt = choice.index // self._n
        if delta.usage is not None:
            choice.usage = delta.usage
        if delta.ending is not None:
            self._num_open -= 1
        changes: dict[str, Any] = {"choice": choice.index}
        told = delta.prompt
        if told is not None:
            if told.scores is not None:
                self._prompts[prompt] = told
            elif (first := self._prompts[prompt]) is not None:
                changes["prompt"] = msgspec.structs.replace(told, scores=first.scores)
        whole = not self._num_open
        changes["usage"] = self._usage() if whole or self._continuous_usage else None
        return msgspec.structs.replace(delta, **changes)

    def _usage(self) -> Usage:
        firsts = [each.usage for each in self._choices[:: self._n] if each.usage is not None]
        num_prompt = sum(usage.prompt_tokens for usage in firsts)
        num_output = sum(each.usage.completion_tokens for each in self._choices if each.usage is not None)
        num_cached = sum(usage.prompt_tokens_details.cached_tokens for usage in firsts)
        return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(num_cached))

    def on_end(self, _: ChoiceCall, error: StatorError | None) -> None:
        if self._over:
            return
        if error is not None:
            self._cancel()
            self._call.end(error)
        elif all(choice.ended for choice in self._choices):
            self._over = True
            self._call.end()

    def _cancel(self) -> None:
        self._over = True
        for choice in self._choices:
            choice.cancel()
