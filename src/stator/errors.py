"""Every way a call can fail, whose fault it is, whether a retry is safe, and what HTTP says.

One table (`ERRORS`) answers all four questions, so that the HTTP status, the metric label and the retry decision
for one failure never disagree. A failure crosses a process boundary as `messages.control.ErrorMessage` and is the
same `StatorError` on the other side.
"""

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from stator.ids import InstanceId

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected: a text in them that is not UTF-8 is no DecodeError."""


class ErrorCode(StrEnum):
    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    """OpenAI's name, by which clients tell that a shorter conversation would do."""
    UNAUTHORIZED = "unauthorized"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TOO_LARGE = "body_too_large"
    REQUEST_TIMEOUT = "request_timeout"
    UNSUPPORTED = "unsupported"
    NO_INSTANCE = "no_instance"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    SLOW_READER = "slow_reader"
    INSTANCE_LOST = "instance_lost"
    STALE_INSTANCE = "stale_instance"
    ENGINE_DEAD = "engine_dead"
    ENGINE_CRASHED = "engine_crashed"
    """The engine failed in a step that computed this very request's prompt or first token: the request may be why."""
    POISON_REQUEST = "poison_request"
    NOT_RESUMABLE = "not_resumable"
    TRANSFER_FAILED = "transfer_failed"
    PROTOCOL = "protocol"
    INTERNAL = "internal"


class Fault(StrEnum):
    CALLER = "caller"
    US = "us"
    PEER = "peer"


class Ending(StrEnum):
    """The one way in which an accepted request ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    INVALID = "invalid"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """status: HTTP status. retry_safe: the call had no effect that a second try would repeat.

    elsewhere: another instance may well succeed with the same request (the Processor may continue there).
    openai_type: the `type` field of OpenAI's error body.
    """

    status: int
    fault: Fault
    retry_safe: bool
    elsewhere: bool
    ending: Ending
    openai_type: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

ERRORS: dict[ErrorCode, ErrorInfo] = {
    ErrorCode.INVALID_REQUEST: ErrorInfo(400, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: ErrorInfo(400, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.UNAUTHORIZED: ErrorInfo(401, Fault.CALLER, False, False, Ending.INVALID, "authentication_error"),
    ErrorCode.MODEL_NOT_FOUND: ErrorInfo(404, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.NOT_FOUND: ErrorInfo(404, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.METHOD_NOT_ALLOWED: ErrorInfo(405, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.BODY_TOO_LARGE: ErrorInfo(413, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.REQUEST_TIMEOUT: ErrorInfo(408, Fault.CALLER, True, False, Ending.INVALID, _INVALID),
    ErrorCode.UNSUPPORTED: ErrorInfo(400, Fault.CALLER, False, False, Ending.INVALID, _INVALID),
    ErrorCode.NO_INSTANCE: ErrorInfo(503, Fault.US, True, False, Ending.REJECTED, _SERVER),
    ErrorCode.OVERLOADED: ErrorInfo(429, Fault.US, True, True, Ending.REJECTED, "rate_limit_error"),
    ErrorCode.DRAINING: ErrorInfo(503, Fault.US, True, True, Ending.REJECTED, _SERVER),
    ErrorCode.CANCELLED: ErrorInfo(499, Fault.CALLER, False, False, Ending.CANCELLED, _INVALID),
    ErrorCode.DEADLINE: ErrorInfo(504, Fault.US, False, False, Ending.DEADLINE, "timeout_error"),
    ErrorCode.SLOW_READER: ErrorInfo(500, Fault.CALLER, False, False, Ending.ERROR, _SERVER),
    ErrorCode.INSTANCE_LOST: ErrorInfo(502, Fault.PEER, True, True, Ending.ERROR, _SERVER),
    ErrorCode.STALE_INSTANCE: ErrorInfo(502, Fault.PEER, True, True, Ending.ERROR, _SERVER),
    ErrorCode.ENGINE_DEAD: ErrorInfo(502, Fault.PEER, True, True, Ending.ERROR, _SERVER),
    ErrorCode.ENGINE_CRASHED: ErrorInfo(502, Fault.PEER, True, True, Ending.ERROR, _SERVER),
    ErrorCode.POISON_REQUEST: ErrorInfo(500, Fault.PEER, False, False, Ending.ERROR, _SERVER),
    ErrorCode.NOT_RESUMABLE: ErrorInfo(502, Fault.PEER, True, False, Ending.ERROR, _SERVER),
    ErrorCode.TRANSFER_FAILED: ErrorInfo(502, Fault.PEER, True, False, Ending.ERROR, _SERVER),
    ErrorCode.PROTOCOL: ErrorInfo(502, Fault.PEER, False, False, Ending.ERROR, _SERVER),
    ErrorCode.INTERNAL: ErrorInfo(500, Fault.US, False, False, Ending.ERROR, _SERVER),
}


class StatorError(Exception):
    """A failure with a code of the table.

    message: for the person who reads it: what happened, to what, and what to do; never internals or prompt text.
    param: the request field at fault, if one is. retry_after_s: when a retry may succeed, if known.
    instance_id: whose failure it is, if not that of the instance which answers with it.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        instance_id: InstanceId | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.instance_id = instance_id

    @property
    def info(self) -> ErrorInfo:
        return ERRORS[self.code]

    def __repr__(self) -> str:
        return f"StatorError({self.code.value}: {self.message})"


class ConfigError(Exception):
    """Configuration that cannot be used. The message names file and line, the value found, and what was expected."""
