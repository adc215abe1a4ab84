"""The form of an answer: what its text must be (a grammar), and what is read out of it (calls, reasoning).

What a model writes for a call, and for its reasoning, follows from its chat template (`core.parser_choice`), or is
configured. A request that asks for nothing of the kind from a model that does not reason has the form PLAIN, and costs
nothing here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stator.core.output_delta import OutputDelta, delta_of, ending_with_calls
from stator.core.parser_choice import choose_parsers
from stator.core.structured import normalize_response_format, normalize_structured_outputs, one_grammar
from stator.core.tools import registry
from stator.core.tools.base import NewId
from stator.core.tools.forced import constrained_answer, force
from stator.core.tools.parser import OutputParser
from stator.core.tools.request import NO_TOOLS, CallMode, ToolRequest, normalize_tools
from stator.errors import Ending, ErrorCode, StatorError
from stator.messages.grammar import Choice, Grammar, Node, OwnGrammar
from stator.messages.openai import ChatCompletionRequest, CompletionRequest
from stator.processor.tokenizer import ModelTokenizer

TEMPLATE_ARGUMENTS: dict[str, type] = {"enable_thinking": bool, "thinking": bool, "thinking_budget": int}
"""What a request may hand to the model's chat template in `chat_template_kwargs`."""

_THINKING_SWITCHES = ("enable_thinking", "thinking")
_FORCED_WITHOUT_FORMAT = "hermes"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """tool_parser, reasoning_parser: names of `core.tools.registry`. asked: the form of the answer's own text.

    param: the request's field that asks for a grammar. template_arguments: for the chat template, beside the tools.
    """

    tools: ToolRequest = NO_TOOLS
    asked: Grammar | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    special_tokens: frozenset[str] = frozenset()
    shown_ids: frozenset[int] = frozenset()
    param: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    tells_reasoning: bool = True

    @property
    def is_read(self) -> bool:
        """Whether the answer is more than its text."""
        return self.reasoning_parser is not None or (self.tool_parser is not None and self.tools.parses_calls)

    def grammar(self, prompt: str) -> Grammar | None:
        """Of an output to this prompt, which may have begun the reasoning."""
        if self.asked is None and not self.tools.is_forced:
            return None
        if self.tools.is_forced or self.asked is None:
            return self._calls(prompt)
        answer = self._answer(self.asked, prompt)
        if not self.tools.parses_calls:
            return answer
        if isinstance(answer, OwnGrammar):
            raise _unsupported("a grammar of your own cannot be combined with tools", self.param)
        return Choice((self._calls(prompt), answer))

    def _is_open(self, prompt: str) -> bool:
        name = self.reasoning_parser
        return name is not None and registry.reasoning_format(name).is_open(prompt)

    def _calls(self, prompt: str) -> Node:
        assert self.tool_parser is not None
        return force(
            registry.tool_format(self.tool_parser).styles,
            self.tools.tools,
            self.tools.names,
            parallel=self.tools.parallel,
            special_tokens=self.special_tokens,
            reasoning=None if self.reasoning_parser is None else registry.reasoning_format(self.reasoning_parser).tags,
            is_open=self._is_open(prompt),
        )

    def _answer(self, asked: Grammar, prompt: str) -> Grammar:
        if self.reasoning_parser is None:
            return asked
        if isinstance(asked, OwnGrammar):
            raise _unsupported("a grammar of your own cannot be kept by a model that reasons first", self.param)
        return constrained_answer(
            asked,
            is_harmony=self.reasoning_parser == registry.HARMONY_REASONING,
            reasoning=registry.reasoning_format(self.reasoning_parser).tags,
            is_open=self._is_open(prompt),
        )

    def reader(self, prompt: str, new_id: NewId) -> "AnswerReader | None":
        """For one output."""
        if not self.is_read:
            return None
        parser = registry.make_parser(
            self.tool_parser if self.tools.parses_calls else None,
            self.reasoning_parser,
            tools=self.tools.tools,
            new_id=new_id,
            is_open=self._is_open(prompt),
            parallel=self.tools.parallel,
        )
        return None if parser is None else AnswerReader(parser, self.tools.mode, tells_reasoning=self.tells_reasoning)


PLAIN_FORM = AnswerForm()


class AnswerReader:
    """Reads one output as it comes."""

    def __init__(self, parser: OutputParser, mode: CallMode, *, tells_reasoning: bool) -> None:
        self._parser = parser
        self._mode = mode
        self._tells_reasoning = tells_reasoning
        self._num_calls = 0

    def read(self, text: str, *, last: bool) -> OutputDelta:
        events = self._parser.feed(text) if text else []
        if last:
            events += self._parser.finish()
        delta = delta_of(events)
        self._num_calls += sum(piece.name is not None for piece in delta.tool_calls)
        if not self._tells_reasoning:
            delta.reasoning = ""
        if self._mode in (CallMode.REQUIRED, CallMode.NAMED):
            # Its grammar has calls and their markup alone: text is markup that max_tokens cut.
            delta.text = ""
        return delta

    def ending(self, ending: Ending) -> Ending:
        return ending_with_calls(ending, self._num_calls, self._mode)


class AnswerForms:
    """Of one model.

    tool_parser, reasoning_parser: instead of those that its template suggests, "none" for none; raises ConfigError if
    there is none such. model_type: of config.json.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        model_type: str = "",
    ) -> None:
        self._template = "" if tokenizer.chat_template is None else tokenizer.chat_template[0]
        self._special_tokens = tokenizer.special_token_ids
        self._tool_parser, self._reasoning_parser = choose_parsers(
            self._template,
            self._special_tokens,
            model_type,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )
        self._plain = self._reasoning_parser is None

    @property
    def parsers(self) -> tuple[str | None, str | None]:
        """(tool parser, reasoning parser)."""
        return self._tool_parser, self._reasoning_parser

    def of_completion(self, request: CompletionRequest) -> AnswerForm:
        """Text is what it is: a completion has no calls and no reasoning, but may have a form.

        Raises StatorError(INVALID_REQUEST or UNSUPPORTED) that names the field, as do the others.
        """
        if request.response_format is None and request.structured_outputs is None:
            return PLAIN_FORM
        asked, param = _asked(request)
        return PLAIN_FORM if asked is None else AnswerForm(asked=asked, param=param)

    def of_chat(self, request: ChatCompletionRequest) -> AnswerForm:
        if self._plain and not _asks_for_form(request):
            return PLAIN_FORM
        asked, param = _asked(request)
        tools = normalize_tools(request.tools, request.tool_choice, request.parallel_tool_calls)
        tool_parser = self._parser_of(tools)
        if tools.is_forced:
            param = "tool_choice"
        shown = registry.shown_markers(tool_parser if tools.parses_calls else None, self._reasoning_parser)
        return AnswerForm(
            tools=tools,
            asked=asked,
            tool_parser=tool_parser,
            reasoning_parser=self._reasoning_parser,
            special_tokens=frozenset(self._special_tokens),
            shown_ids=frozenset(self._special_tokens[text] for text in shown if text in self._special_tokens),
            param=param,
            template_arguments=self._template_arguments(request),
            tells_reasoning=request.include_reasoning is not False,
        )

    def _parser_of(self, tools: ToolRequest) -> str | None:
        if not tools.parses_calls:
            return self._tool_parser
        takes_tools = "tools" in self._template
        if tools.is_forced:
            # The grammar makes the calls right, whatever the model was taught.
            return self._tool_parser or _FORCED_WITHOUT_FORMAT
        if not takes_tools:
            raise _unsupported("this model's chat template takes no tools; only a forced tool_choice works", "tools")
        if self._tool_parser is None:
            raise _unsupported(
                "the format in which this model calls tools is not known here; name one with tool-call-parser, or "
                "force the tool_choice",
                "tools",
            )
        return self._tool_parser

    def _template_arguments(self, request: ChatCompletionRequest) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in (request.chat_template_kwargs or {}).items():
            where = f"chat_template_kwargs.{name[:64]}"
            kind = TEMPLATE_ARGUMENTS.get(name)
            if kind is None:
                raise _unsupported(f"not an argument that may be given; {', '.join(TEMPLATE_ARGUMENTS)} are", where)
            if type(value) is not kind:
                raise StatorError(ErrorCode.INVALID_REQUEST, f"{where} must be {_KINDS[kind]}", param=where)
            found[name] = value
        if request.reasoning_effort is not None:
            self._add_effort(request.reasoning_effort, found)
        return found

    def _add_effort(self, effort: str, found: dict[str, Any]) -> None:
        """OpenAI's words for how much a model reasons, as far as this model's template has any."""
        if "reasoning_effort" in self._template:
            found["reasoning_effort"] = effort
            return
        switches = [name for name in _THINKING_SWITCHES if name in self._template]
        if switches:
            for name in switches:
                found.setdefault(name, effort != "none")
        elif effort != "none" or self._reasoning_parser is not None:
            raise _unsupported("how much this model reasons cannot be chosen", "reasoning_effort")


_KINDS: dict[type, str] = {bool: "true or false", int: "an integer"}


def _asks_for_form(request: ChatCompletionRequest) -> bool:
    return bool(
        request.tools
        or request.tool_choice not in (None, "none", "auto")
        or request.response_format is not None
        or request.structured_outputs is not None
        or request.chat_template_kwargs
        or request.reasoning_effort not in (None, "none")
    )


def _asked(request: ChatCompletionRequest | CompletionRequest) -> tuple[Grammar | None, str | None]:
    """The form of the answer's text, and the field that asks for it."""
    asked = one_grammar(
        normalize_response_format(request.response_format), normalize_structured_outputs(request.structured_outputs)
    )
    if asked is None:
        return None, None
    return asked, "response_format" if request.structured_outputs is None else "structured_outputs"


def check_with_grammar(request: ChatCompletionRequest | CompletionRequest, param: str | None) -> None:
    """Fields that would have an output leave its grammar, or never end."""
    for name in ("ignore_eos", "allowed_token_ids"):
        if getattr(request, name):
            raise StatorError(ErrorCode.INVALID_REQUEST, f"{name} cannot be kept together with {param}", param=name)


def _unsupported(message: str, param: str | None) -> StatorError:
    return StatorError(ErrorCode.UNSUPPORTED, f"{param}: {message}" if param else message, param=param)


def new_call_id(draw: Callable[[int], int]) -> NewId:
    """draw: random bits."""
    return lambda: f"call_{draw(96):024x}"


def named_by(error: StatorError, param: str | None) -> StatorError:
    """An engine's error about the grammar, with the name of the field that asked for it."""
    if error.param != "grammar" or param is None:
        return error
    return StatorError(error.code, error.message.replace("do grammar", f"do {param}"), param=param)
