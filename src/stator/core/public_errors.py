"""What a client is told of a failure that is not its own. Pure.

Messages about the request, about load and about readiness are written for whoever asks. Those of a failed peer or of
a bug are for whoever runs the deployment: they may name addresses, classes and files, or quote an exception. Clients
get a sentence of their own for each such code; the message goes to the log.
"""

from stator.core.public_text import shows_internals
from stator.errors import ErrorCode, Fault, StatorError

_LOG_SAYS_WHY = "its log says why"

TOLD: dict[ErrorCode, str] = {
    ErrorCode.INTERNAL: f"The server failed to answer this request; {_LOG_SAYS_WHY}.",
    ErrorCode.PROTOCOL: f"A part of the server could not understand another one; {_LOG_SAYS_WHY}.",
    ErrorCode.INSTANCE_LOST: "The connection to the part of the server that worked on this request was lost.",
    ErrorCode.STALE_INSTANCE: "The part of the server that this request was sent to is not there any more.",
    ErrorCode.ENGINE_DEAD: f"The engine that worked on this request failed; {_LOG_SAYS_WHY}.",
    ErrorCode.ENGINE_CRASHED: f"The engine that worked on this request failed; {_LOG_SAYS_WHY}.",
    ErrorCode.TRANSFER_FAILED: f"The prompt's KV cache did not reach the engine; {_LOG_SAYS_WHY}.",
}


def told(error: StatorError) -> StatorError:
    """The error as a client may see it: itself, or one of the same code with a sentence of ours."""
    message = TOLD.get(error.code)
    if message is None and error.info.fault is not Fault.CALLER and shows_internals(error.message):
        message = f"The server cannot answer this request now; {_LOG_SAYS_WHY}."
    if message is None or message == error.message:
        return error
    return StatorError(error.code, message, param=error.param, retry_after_s=error.retry_after_s)
