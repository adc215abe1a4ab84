"""What an answer contains beside the text of one choice."""

from dataclasses import dataclass
from typing import Any

from stator.messages.openai import ChatCompletionRequest, CompletionRequest, is_plain, shows_prompt_only


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """n: choices of each prompt. num_top: alternatives told with each token; None: no probabilities.

    num_prompt_top: the same of the prompt's tokens. echo: the prompt comes before the output. prompt_only: and nothing
    after it. token_ids: of prompt and output. text_offsets: where tokens begin in the text. continuous_usage: what was
    used so far comes with every delta.
    """

    n: int = 1
    num_top: int | None = None
    num_prompt_top: int | None = None
    echo: bool = False
    prompt_only: bool = False
    token_ids: bool = False
    text_offsets: bool = False
    continuous_usage: bool = False
    skip_special_tokens: bool = True

    @property
    def has_details(self) -> bool:
        """Whether more is told of a choice than its text."""
        return (
            self.num_top is not None
            or self.num_prompt_top is not None
            or self.echo
            or self.token_ids
            or self.continuous_usage
        )


PLAIN = AnswerOptions()


def answer_options(request: ChatCompletionRequest | CompletionRequest) -> AnswerOptions:
    """Of a request that passed `validation`."""
    if is_plain(request):
        return PLAIN
    options = request.stream_options
    common: dict[str, Any] = {
        "n": request.n or 1,
        "token_ids": bool(request.return_token_ids),
        "continuous_usage": options is not None and options.include_usage and options.continuous_usage_stats,
        "skip_special_tokens": request.skip_special_tokens,
    }
    if isinstance(request, ChatCompletionRequest):
        num_top = (request.top_logprobs or 0) if request.logprobs else None
        return AnswerOptions(num_top=num_top, num_prompt_top=request.prompt_logprobs, **common)
    num_prompt_top, echo = request.prompt_logprobs, bool(request.echo)
    if num_prompt_top is None and echo:
        num_prompt_top = request.logprobs
    return AnswerOptions(
        num_top=request.logprobs,
        num_prompt_top=num_prompt_top,
        echo=echo,
        prompt_only=shows_prompt_only(request),
        text_offsets=request.logprobs is not None,
        **common,
    )
