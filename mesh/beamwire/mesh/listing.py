"""What a caller may see, the same for every resource: one record, or one page of a List method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from beamwire.mesh.names import parse_name
from beamwire.mesh.pages import Pager, page_size, parse_filter
from beamwire.mesh.rpc.access import check_owner, current_caller, owner_filter
from beamwire.mesh.store import Record, Store

R = TypeVar("R", bound=Record)


class ListRequest(Protocol):
    """What every List request has (AIP-132, AIP-158, AIP-160)."""

    @property
    def page_size(self) -> int:
        """The most records to return; 0 for the default."""
        ...

    @property
    def page_token(self) -> str:
        """The token of the page before; empty for the first."""
        ...

    @property
    def filter(self) -> str:
        """Equalities joined by AND."""
        ...


async def visible(store: Store[R], collection: str, name: str) -> R:
    """Return one record if the caller may see it.

    Raises:
        BeamwireError: INVALID_FIELD for a malformed name, NOT_OWNER, or RESOURCE_NOT_FOUND for those who see all.
    """
    parse_name(collection, name)
    record = await store.get(name)
    check_owner(record.owner if record else None, collection.removesuffix("s"), name)
    assert record is not None, "check_owner raises for what does not exist"
    return record


async def list_page(
    store: Store[R], pager: Pager, request: ListRequest, keys: Mapping[str, str]
) -> tuple[list[R], str]:
    """Return the records of one page that the caller may see, newest first, and the token of the next page.

    Args:
        store: where the records are.
        pager: makes and reads tokens.
        request: the List request.
        keys: the filter keys of the API and what each is called in the records; `labels.*` admits any label.

    Raises:
        BeamwireError: INVALID_FIELD for a filter or page size, INVALID_PAGE_TOKEN.
    """
    caller = str(current_caller())
    equals = {keys.get(key, key): value for key, value in parse_filter(request.filter, keys).items()}
    limit = page_size(request.page_size)
    after = pager.cursor(request.page_token, request.filter, caller) if request.page_token else ""
    records = await store.list(owner=owner_filter(), equals=equals, limit=limit + 1, after=after)
    if len(records) <= limit:
        return records, ""
    return records[:limit], pager.token(records[limit - 1].cursor, request.filter, caller)
