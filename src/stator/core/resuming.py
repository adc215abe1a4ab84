"""Which requests can go on from the tokens they have, on which engines. Pure.

An engine resumes a request from `resume_ids`; what it keeps about a sequence beside its tokens is lost with it. The
local engine derives everything from seed, position and tokens. Another engine declares the sampling fields that it
cannot resume (`EngineInfo.cannot_resume`), and a few fields no engine can. A request that uses one of them and has
delivered tokens must not go on as if nothing had happened: its text would not be the one that was asked for.
"""

from collections.abc import Callable, Collection

from stator.messages.engine import SamplingParams

NEVER_RESUMED: tuple[str, ...] = ("n",)
"""Sampling fields that no engine resumes: several outputs of one prompt, which are requests of their own here. A name
is in force as soon as SamplingParams has the field."""

_DEFAULTS = SamplingParams(max_tokens=1)

_USED: dict[str, Callable[[SamplingParams], bool]] = {
    # A greedy request draws nothing. A seed that we drew ourselves may be another one: nobody asked for it.
    "seed": lambda sampling: sampling.seed is not None and not sampling.seed_drawn and sampling.temperature > 0.0,
}
"""When a field is in use, where that is not simply "its value is not the default"."""


def uses(sampling: SamplingParams, field: str) -> bool:
    """Whether a field has an effect on this request. Fields that this version does not know have none."""
    if field in _USED:
        return _USED[field](sampling)
    default = getattr(_DEFAULTS, field, None)
    return getattr(sampling, field, default) != default


def first_used(sampling: SamplingParams, fields: Collection[str]) -> str | None:
    """The first of `fields` that is in use: with an engine's `cannot_resume`, why it cannot continue the request."""
    return next((field for field in fields if uses(sampling, field)), None)
