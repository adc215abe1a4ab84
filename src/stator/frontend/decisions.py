"""`GET /v1/stator/decisions/{id}`: where a request was sent and why, asked of the routers behind the Processors."""

import logging

from stator.errors import ErrorCode, StatorError
from stator.frontend.generate import Targets
from stator.frontend.http import HttpExchange, encode_json
from stator.ids import RequestId
from stator.messages.routing import DecisionRecord, DecisionsRequest
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import TransportClient
from stator.transport.calls import stream

logger = logging.getLogger(__name__)

DECISION_PREFIX = "/v1/stator/decisions/"
ANSWER_ID_PREFIXES = ("chatcmpl-", "cmpl-")
TIMEOUT_S = 5.0


class DecisionView:
    def __init__(self, client: TransportClient, targets: Targets) -> None:
        self._client = client
        self._targets = targets

    async def __call__(self, http: HttpExchange) -> bytes:
        """JSON: the decisions about one request, the newest first; there is one for each instance it was sent to.

        The id is that of the answer's body, with or without `chatcmpl-`. Raises StatorError(NOT_FOUND).
        """
        request_id = http.path.removeprefix(DECISION_PREFIX)
        for prefix in ANSWER_ID_PREFIXES:
            request_id = request_id.removeprefix(prefix)
        records = await self._ask(DecisionsRequest(RequestId(request_id)), RequestId(http.call_id))
        if not records:
            raise StatorError(
                ErrorCode.NOT_FOUND,
                "No decision about this request is known: it is not among the last few thousand, or its id is "
                "not the one in the answer's body.",
            )
        return encode_json({"request_id": request_id, "decisions": records})

    async def _ask(self, request: DecisionsRequest, call_id: RequestId) -> list[DecisionRecord]:
        """All routers are asked in turn until one knows the request. Raises the last failure if none does."""
        failure: StatorError | None = None
        for target in self._targets("decisions"):
            context = CallContext(call_id, loop_time() + TIMEOUT_S)
            records: list[DecisionRecord] = []
            try:
                async for items in stream(self._client, target, request, context=context, item_type=DecisionRecord):
                    records += items
            except StatorError as error:
                logger.info("a processor could not say what its router decided: %r", error)
                failure = error
            if records:
                return records
        if failure is not None:
            raise failure
        return []
