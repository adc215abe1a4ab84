"""`/v1/responses`: OpenAI's Responses API, as chat completions behind it, and the responses that are kept."""

import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.frontend.decode import CHAT
from stator.frontend.http import OPENAI_ERRORS, HttpExchange, encode_json
from stator.frontend.response_store import ResponseKeeper
from stator.frontend.responses_answer import ResponseForm, ResponseStream, WholeResponse
from stator.frontend.responses_request import (
    ItemIds,
    chat_request,
    decode_responses,
    in_our_names,
    read_input,
    response_of,
)
from stator.messages.openai import ChatCompletionRequest
from stator.messages.processor import CompletionDelta
from stator.messages.responses import Json, ResponsesRequest, StoredResponse

PATH = "/v1/responses"
PREFIX = PATH + "/"
INPUT_ITEMS = "/input_items"

MAX_REFERENCED = 64
"""Responses whose items one request may refer to."""

LOOKUP_FACTOR = 4
"""Of what one request refers to, so many times the bound of a body may be looked through."""

MAX_LISTED = 100
DEFAULT_LISTED = 20
_ECHOED_CHARS = 80

_ITEMS = msgspec.json.Decoder(list[dict[str, Any]]).decode


def not_kept(response_id: str, param: str | None = None) -> StatorError:
    return StatorError(
        ErrorCode.NOT_FOUND,
        f"There is no response {response_id[:_ECHOED_CHARS]!r}. A response is kept in the memory of the frontend "
        "process that made it, unless it failed or 'store' was false, until it is a day old, there is no more "
        "room for it, or the process ends.",
        param=param,
    )


@dataclass(frozen=True, slots=True)
class ResponsesAsked:
    """before: turns of the conversation that went before. items: this turn's own input."""

    body: ResponsesRequest
    request: ChatCompletionRequest
    ids: ItemIds
    before: tuple[bytes, ...]
    items: list[Json]
    keeper: ResponseKeeper
    wall: Callable[[], float]
    num_choices: int = 1
    may_be_empty: bool = False

    @property
    def streams(self) -> bool:
        return bool(self.body.stream)

    def stream_encoder(self, call_id: str, created: int, first: CompletionDelta) -> ResponseStream:
        return ResponseStream(self._form(created), self.ids, self.wall, self._keep)

    def whole_encoder(self, call_id: str, created: int, first: CompletionDelta) -> WholeResponse:
        return WholeResponse(self._form(created), self.ids, self.wall, self._keep)

    def named(self, error: StatorError) -> StatorError:
        return in_our_names(error)

    def _form(self, created: int) -> ResponseForm:
        return ResponseForm(self.ids.response_id, self.body, created)

    def _keep(self, response: Json) -> None:
        if self.body.store is not False:
            turns = (*self.before, encode_json(self.items), encode_json(response["output"]))
            self.keeper.keep(StoredResponse(self.ids.response_id, encode_json(response), turns))


class ResponsesDialect:
    """max_bytes: of a conversation, as JSON; the bound of a request's body, which could have it all. wall: Unix
    seconds. new_base: of a response's ids, see ItemIds."""

    label = "responses"
    endpoint = CHAT
    errors = OPENAI_ERRORS
    generates = True

    def __init__(
        self,
        keeper: ResponseKeeper,
        *,
        max_bytes: int,
        wall: Callable[[], float] = time.time,
        new_base: Callable[[], str] = lambda: secrets.token_hex(24),
    ) -> None:
        self._keeper = keeper
        self._max_bytes = max_bytes
        self._wall = wall
        self._new_base = new_base

    def decode(self, body: bytes) -> ResponsesAsked | Coroutine[Any, Any, ResponsesAsked]:
        """Has to wait only if something that is kept goes before."""
        request = decode_responses(body)
        ids = ItemIds(self._new_base())
        items = read_input(request.input, ids)
        if request.previous_response_id is None and not any(item["type"] == "item_reference" for item in items):
            return self._asked(request, ids, (), items)
        return self._continued(request, ids, items)

    async def _continued(self, request: ResponsesRequest, ids: ItemIds, items: list[Json]) -> ResponsesAsked:
        before: tuple[bytes, ...] = ()
        if request.previous_response_id is not None:
            previous = await self._keeper.find(request.previous_response_id)
            if previous is None:
                raise not_kept(request.previous_response_id, "previous_response_id")
            before = previous.turns
        num_bytes = sum([len(turn) for turn in before])
        if num_bytes > self._max_bytes:
            raise self._too_long("previous_response_id")
        return self._asked(request, ids, before, await self._with_references(items, num_bytes))

    def _too_long(self, param: str) -> StatorError:
        message = f"{param}: the conversation is longer than the limit of {self._max_bytes} bytes."
        return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)

    async def _with_references(self, items: list[Json], num_bytes: int) -> list[Json]:
        """num_bytes: that go before the items."""
        known: dict[str, dict[str, tuple[Json, int]]] = {}
        looked_through = 0
        found: list[Json] = []
        for index, item in enumerate(items):
            if item["type"] != "item_reference":
                found.append(item)
                continue
            where = f"input[{index}].id"
            response_id = response_of(item["id"])
            if response_id is not None and response_id not in known:
                response = await self._keeper.find(response_id)
                if response is None:
                    raise not_kept(response_id, where)
                looked_through += sum([len(turn) for turn in response.turns[-2:]])
                if len(known) == MAX_REFERENCED or looked_through > LOOKUP_FACTOR * self._max_bytes:
                    message = "input refers to items of too many responses."
                    raise StatorError(ErrorCode.INVALID_REQUEST, message, param=where)
                own = [each for turn in response.turns[-2:] for each in _ITEMS(turn)]
                known[response_id] = {each["id"]: (each, len(encode_json(each))) for each in own}
            referred = None if response_id is None else known[response_id].get(item["id"])
            if referred is None:
                message = f"There is no item {item['id'][:_ECHOED_CHARS]!r} in the responses that are kept."
                raise StatorError(ErrorCode.NOT_FOUND, message, param=where)
            # One item may be referred to many times, by few bytes each.
            num_bytes += referred[1]
            if num_bytes > self._max_bytes:
                raise self._too_long(where)
            found.append(referred[0])
        return found

    def _asked(
        self, request: ResponsesRequest, ids: ItemIds, before: tuple[bytes, ...], items: list[Json]
    ) -> ResponsesAsked:
        conversation = [item for turn in before for item in _ITEMS(turn)] + items
        chat = chat_request(request, conversation)
        return ResponsesAsked(request, chat, ids, before, items, self._keeper, self._wall)


class KeptResponses:
    """`GET` and `DELETE` of a response, `GET` of its input items."""

    def __init__(self, keeper: ResponseKeeper) -> None:
        self._keeper = keeper

    async def handle(self, http: HttpExchange) -> None:
        """http: of a path that begins with PREFIX."""
        response_id = http.path.removeprefix(PREFIX)
        lists = response_id.endswith(INPUT_ITEMS)
        response_id = response_id.removesuffix(INPUT_ITEMS)
        if "/" in response_id or not response_id:
            raise StatorError(ErrorCode.NOT_FOUND, f"There is nothing at {http.path[:_ECHOED_CHARS]!r}.")
        if http.method == "DELETE" and not lists:
            await self._delete(http, response_id)
        elif http.method in ("GET", "HEAD"):
            query = _query(http)
            response = await self._find(response_id)
            await http.respond(200, _list_items(response, query) if lists else _shown(response, query))
        else:
            error = StatorError(ErrorCode.METHOD_NOT_ALLOWED, f"{http.method[:16]!r} is not taken here.")
            await http.fail(error, [(b"allow", b"GET, HEAD" if lists else b"GET, HEAD, DELETE")])

    async def _find(self, response_id: str) -> StoredResponse:
        response = await self._keeper.find(response_id)
        if response is None:
            raise not_kept(response_id)
        return response

    async def _delete(self, http: HttpExchange, response_id: str) -> None:
        if not await self._keeper.remove(response_id):
            raise not_kept(response_id)
        await http.respond(200, encode_json({"id": response_id, "object": "response", "deleted": True}))


def _query(http: HttpExchange) -> dict[str, str]:
    """The last value of each name."""
    try:
        pairs = parse_qs(http.query.decode("ascii"), keep_blank_values=True, max_num_fields=64)
    except ValueError:
        raise StatorError(ErrorCode.INVALID_REQUEST, "The query cannot be read.") from None
    return {name: values[-1] for name, values in pairs.items()}


def _shown(response: StoredResponse, query: dict[str, str]) -> bytes:
    if query.get("stream", "false") != "false":
        raise StatorError(ErrorCode.UNSUPPORTED, "stream: what is kept is shown whole.", param="stream")
    return response.body


def _list_items(response: StoredResponse, query: dict[str, str]) -> bytes:
    """A page of everything that went into the response, the newest first unless asked otherwise."""
    limit, order, after = query.get("limit", str(DEFAULT_LISTED)), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_LISTED):
        raise StatorError(ErrorCode.INVALID_REQUEST, f"limit must be 1 to {MAX_LISTED}.", param="limit")
    if order not in ("asc", "desc"):
        raise StatorError(ErrorCode.INVALID_REQUEST, "order must be asc or desc.", param="order")
    items = [item for turn in response.turns[:-1] for item in _ITEMS(turn)]
    if order == "desc":
        items.reverse()
    page = _page(items, after, int(limit))
    return encode_json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": bool(page) and page[-1] is not items[-1],
        }
    )


def _page(items: Sequence[Json], after: str | None, limit: int) -> Sequence[Json]:
    start = 0
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            message = f"after: there is no item {after[:_ECHOED_CHARS]!r} among the input items."
            raise StatorError(ErrorCode.INVALID_REQUEST, message, param="after")
        start = places[-1] + 1
    return items[start : start + limit]
