"""Where Stator's answers differ from those of vLLM's own server, and why; docs/reference/vllm-server.md tells users.

A difference is a line as `test_own_server.differences` makes it: `+ path = value` of a field that only Stator has,
`- path = value` of one that only vLLM has, `~ path: ours != theirs`.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """line: the whole of it. reason: stands in the document, word for word."""

    line: str
    reason: str

    def covers(self, line: str) -> bool:
        return re.fullmatch(self.line, line, re.DOTALL) is not None


RULES = (
    Rule(r"~ .*\.(id|created): .*", "ids and times"),
    Rule(r"- .* = None", "fields that are null there are left out here"),
    Rule(r"- .*\.system_fingerprint = .*", "no `system_fingerprint`"),
    Rule(r"- .*\.stop_reason = .*", "no `stop_reason`: which stop string matched is not told"),
    Rule(r"~ .*\.keys: .*", "which fields a stream's chunks have"),
    Rule(r"[~+] .*\.prompt_tokens_details.*", "cached tokens are always told"),
    Rule(r"\+ .*\.message\.refusal = None|\+ .*\.logprobs\.refusal = None", "`refusal` stands where OpenAI has it"),
    Rule(r"~ .*(content|text\.0): '(.*)\ufffd' != '\2'", "half a character at the end of an output is shown"),
    Rule(r"~ .*\.logprobs\.content\[\d+\]\..*(bytes|token): .*", "a token's own bytes, also of half a character"),
    Rule(r"~ .*\.logprobs\.text_offset\[\d+\]: .*", "with `echo`, offsets count from the beginning of the text"),
    Rule(r"- .*\.prompt_logprobs = .*", "`echo` with `logprobs` has the prompt's in `logprobs` alone"),
    Rule(r"~ .*\.owned_by: .*", "`owned_by`"),
    Rule(r"- .*\.data\[0\]\.(root|permission) = .*", "a model's path is not shown"),
    Rule(r"~ .*\.error\.(code|type|message|param): .*", "errors have OpenAI's form, with the field in `param`"),
    Rule(r"- \.body\.detail = .*|\+ \.body\.error = .*", "errors have OpenAI's form, with the field in `param`"),
)

OTHER_ANSWERS = {
    "chat with two choices": "several choices also when greedy",
    "completions of two prompts": "several choices also when greedy",
    "chat with a named function": "a forced call is a call, whatever the model was taught",
}
"""Requests that vLLM's server refuses or answers with something else."""
