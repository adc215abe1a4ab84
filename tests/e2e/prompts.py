"""Conversations that between them are short, long, share prefixes, and contain multi-byte characters."""

from typing import Any

Messages = list[dict[str, Any]]

_RULES = " ".join(
    f"Rule {n}: when somebody asks about the {thing}, answer in rhyme and name the {place} at least once."
    for n, (thing, place) in enumerate(
        [
            ("fox", "river"), ("moon", "hill"), ("king", "garden"), ("ark", "sea"), ("owl", "forest"),
            ("baker", "market"), ("lamb", "meadow"), ("ship", "harbour"), ("crown", "castle"), ("bell", "tower"),
        ],
        start=1,
    )
)  # fmt: skip
_SYSTEM = {"role": "system", "content": "You tell stories. " + _RULES}

_LONG = "In the beginning God created the heaven and the earth. And the earth was without form, and void. " * 30

PROMPTS: list[Messages] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "user", "content": "Tell me a story about a fox and the moon."}],
    [{"role": "user", "content": _LONG + "Tell me what happened then."}],
    [_SYSTEM, {"role": "user", "content": "Tell me about the fox."}],
    [_SYSTEM, {"role": "user", "content": "Tell me about the moon."}],
    [_SYSTEM, {"role": "user", "content": "Tell me about the fox and the king, please."}],
    [{"role": "user", "content": "Zoë, José and 猫 met in Москва under the 🌙. Tell me a story about Zoë and 🦊."}],
    [
        {"role": "user", "content": "Zoë und Łukasz suchten die 猫. " * 12 + "Tell me about Ōtani."},
        {"role": "assistant", "content": "Ōtani walked to the river 🌙."},
        {"role": "user", "content": "And then?"},
    ],
]
