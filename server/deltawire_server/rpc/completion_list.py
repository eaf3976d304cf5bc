"""The list of completions: its filters, its pages, and the pages of several workers together.

The order is that of admission, newest first. A page token has the time at which the last completion of the page was admitted, in
microseconds, and its worker, which together are unique in a gateway. It has no id, because an id may be what protects a completion.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.errors import GatewayError, Reason, Violation, invalid_request
from deltawire_server.pacing import give_way
from deltawire_server.registry import pages
from deltawire_server.rpc import convert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.completions.records import Record
    from deltawire_server.rpc.interceptors import CallRecord
    from deltawire_server.worker import Worker

STEP = 100
"""Records that are examined before other calls run: 2 ms if all of them are listed."""

Place = tuple[int, int]
"""The place of a completion in the order: when it was admitted, and its worker."""


@dataclass(frozen=True, slots=True)
class Query:
    """A valid request for a page.

    Attributes:
        page: The size of the page, and the digest of the filters.
        after: The place of the last completion of the previous page; `None` for the first page.
        owner: The owner whose completions may be listed; `None` for all owners.
        request: The request, with the filters.
    """

    page: pages.PageRequest
    after: Place | None
    owner: str | None
    request: chat_pb.ListChatCompletionsRequest

    def includes(self, record: Record) -> bool:
        """Whether a record passes the filters, except that of time."""
        wanted, head = self.request, record.head
        return (
            self.owner in (None, record.caller)
            and wanted.caller in ("", record.label)
            and (not wanted.model or (head is not None and wanted.model in (head.model, head.alias)))
            and (not wanted.provider_id or (head is not None and wanted.provider_id == head.provider_id))
            and (not wanted.states or convert.state(record) in wanted.states)
        )


def require_operator(record: CallRecord, caller: str) -> None:
    """Check that a call may name this caller: itself, or any caller if it is an operator's.

    Raises:
        GatewayError: PERMISSION_DENIED.
    """
    if caller and caller != record.caller and not record.is_operator:
        raise GatewayError(
            Reason.PERMISSION_DENIED,
            f"completions of {caller} are visible to that caller, and with the permission operate: leave caller out, or use a "
            "credential that has it",
            metadata={"caller": record.caller, "needs": "operate"},
        )


def query_of(request: chat_pb.ListChatCompletionsRequest, record: CallRecord) -> Query:
    """Validate a request.

    Args:
        request: The request.
        record: The call, with the caller's name and permissions.

    Raises:
        CallerError: INVALID_REQUEST: the page size, the page token or a state is invalid.
        GatewayError: PERMISSION_DENIED: it names another caller.
    """
    known = chat_pb.CompletionState.values()[1:]
    if any(state not in known for state in request.states):
        names = ", ".join(chat_pb.CompletionState.keys()[1:])
        raise invalid_request([Violation("states", f"must be some of {names}")])
    require_operator(record, request.caller)
    filters = chat_pb.ListChatCompletionsRequest()
    filters.CopyFrom(request)
    filters.ClearField("page_size")
    filters.ClearField("page_token")
    page = pages.asked_for(request.page_size, request.page_token, filters.SerializeToString(deterministic=True).hex())
    after: Place | None = None
    if page.after:
        try:
            created, worker = map(int, page.after.split("."))
        except ValueError:
            raise invalid_request([pages.INVALID_TOKEN]) from None
        after = (created, worker)
    return Query(page, after, None if record.is_operator else record.owner, request)


async def page_of(query: Query, worker: Worker, number: int) -> chat_pb.ListChatCompletionsResponse:
    """A page of the completions of this process. Other calls run in between.

    Args:
        query: From `query_of`.
        worker: Has the completions.
        number: The number of this worker process.
    """
    response = chat_pb.ListChatCompletionsResponse()
    before = None
    if query.after is not None:
        created, after_number = query.after
        # Of two completions at the same time, that of the worker with the higher number is first.
        before = created + (number < after_number)
    start, room = query.request.create_time_from.ToNanoseconds(), pages.MAX_PAGE_BYTES
    for position, record in enumerate(worker.newest(before), 1):
        if record.created * 1000 < start:
            break
        if len(response.completions) == query.page.size or room < 0:
            response.next_page_token = _token(query, _place(response.completions[-1]))
            break
        if query.includes(record):
            entry = convert.summary(record, worker.process, number, for_operator=query.owner is None)
            response.completions.append(entry)
            room -= entry.ByteSize()
        if position % STEP == 0:
            await give_way()
    return response


def joined(
    query: Query, parts: Sequence[chat_pb.ListChatCompletionsResponse], unreachable: Sequence[int]
) -> chat_pb.ListChatCompletionsResponse:
    """One page of the pages of several workers, each for the same request.

    Args:
        query: From `query_of`.
        parts: The pages.
        unreachable: The workers that did not answer.
    """
    response = chat_pb.ListChatCompletionsResponse(unreachable_workers=unreachable)
    # After the last entry of a page with a token, that worker has entries that are not in it.
    last = max((_place(part.completions[-1]) for part in parts if part.next_page_token), default=(0, 0))
    in_order = heapq.merge(*(part.completions for part in parts), key=_place, reverse=True)
    entries = list(itertools.islice(in_order, query.page.size + 1))
    shown, room = [], pages.MAX_PAGE_BYTES
    for entry in entries[: query.page.size]:
        if _place(entry) < last or room < 0:
            break
        shown.append(entry)
        room -= entry.ByteSize()
    response.completions.extend(shown)
    if shown and (last > (0, 0) or len(shown) < len(entries)):
        response.next_page_token = _token(query, _place(shown[-1]))
    return response


def _place(entry: chat_pb.CompletionSummary) -> Place:
    return entry.create_time.ToMicroseconds(), entry.worker


def _token(query: Query, place: Place) -> str:
    return query.page.token_after(f"{place[0]}.{place[1]}")
