"""Batches of a stream as a PyTorch dataset: every worker of every rank is one more consumer of the same group.

    with BeamwireDataset("request.yaml") as dataset:
        for batch in dataset.loader(num_workers=4):
            images = batch["detector_data"]  # a tensor of shape (events, height, width)

Needs torch 2.6 or newer, which the extra `beamwire[torch]` installs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from beamwire.client.apart import Apart
from beamwire.client.batch import Batch
from beamwire.client.client import connect
from beamwire.client.forks import has_used_grpc
from beamwire.client.groups import for_group
from beamwire.client.request import ParsedRequest
from beamwire.client.session import Via
from beamwire.client.source import Source, parse_source
from beamwire.client.stream import Stream
from beamwire.client.transfers import failure_of, full_name
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.names import new_id
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer

_OWN_KEYS = frozenset({"event_id", "payload", "media_type"})
_TENSOR_KINDS = frozenset("biufc")
# Before the reason and the message, in a text that may hold a whole traceback.
_SAYS = "the stream failed with "


class WorkerError(BeamwireError):
    """What a stream raised in a worker. DataLoader makes it again in the main process, with a text as all it has."""

    def __init__(self, text: str) -> None:
        name, _, message = text.rpartition(_SAYS)[2].partition(": ")
        known = name in Reason.__members__
        super().__init__(Reason[name] if known else Reason.INTERNAL, message if known else text)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.text,)


class BeamwireDataset(IterableDataset[dict[str, Any] | None]):
    """The batches of one stream, each once, over all workers and ranks together.

    `source` is a request, the name of a transfer, or a connect string. A request becomes a transfer when the block is
    entered (or `open` is called): once, by rank 0; the other ranks join it. Leaving the block early cancels it.
    Iterating raises BeamwireError as a stream of the SDK does.

    One pass: what was delivered is gone, so the next epoch is another dataset. How the events fall to the workers
    depends on who is ready; a worker that dies loses nothing, for another gets what it had not done with.

    Each batch is a dict: of each field the tensor of shape (N, …), which shares the memory of the frame, or the numpy
    array if torch has no such element type (text); `event_id`, uint64 (N,); of a ragged field `<name>` the values and
    `<name>.row_offsets`; of an opaque frame `payload`, uint8, and `media_type`. A field that is called as one of these
    gets `_` at its end.

    Args:
        source: what to read.
        transfer_id: the id that the transfer shall have, the same on every rank; agreed upon over torch.distributed if
            empty, which must be initialised then if there are several ranks.
        group: the group whose work is shared.
        facility, config_dir: as for `connect`.
        prefetch: how many frames each worker may hold ready.
        idle: after so many seconds without a batch yield None, and go on; by default wait until there is one. For
            loops that must not wait: a rank of DistributedDataParallel that has no batch, while another that has some
            waits for it in a collective, would wait for ever, since the stream ends when all have done with theirs.
        via: how the events come, as for `Client.stream`.
        rank, world_size: of this process; by default what torch.distributed says, else RANK and WORLD_SIZE.
    """

    def __init__(
        self,
        source: Source,
        *,
        transfer_id: str = "",
        group: str = "",
        facility: str | None = None,
        config_dir: Path | None = None,
        prefetch: int = 4,
        idle: float | None = None,
        via: Via = "data",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        parsed = parse_source(source)
        self._request = for_group(parsed, group) if isinstance(parsed, ParsedRequest) else None
        # Not by this process itself: its workers may be forked.
        self._facility = Apart(facility, config_dir)
        self._idle = idle
        self._options: dict[str, Any] = {"group": group, "prefetch": prefetch, "via": via}
        self._rank, ranks = _place(rank, world_size)
        if self._request is not None:
            self._source = full_name("transfers", _agree(transfer_id, self._rank, ranks))
            self._opened = False
        else:
            self._source = str(parsed)
            self._opened = True

    @property
    def transfer(self) -> str:
        """The name of the transfer, `transfers/<id>`; empty for a connect string."""
        return self._source if self._source.startswith("transfers/") else ""

    def open(self) -> Self:
        """Create the transfer, on rank 0, if this is a request, or wait for it. Before the workers start, once."""
        if self._request is None or self._opened:
            return self
        if self._rank == 0:
            self._facility.create(self._request, self._source.removeprefix("transfers/"))
        else:
            self._facility.find(self._source)
        self._opened = True
        return self

    def close(self) -> None:
        """Cancel the transfer if it was made for this dataset, on rank 0, and has not ended."""
        if self._request is None or self._rank != 0 or not self._opened:
            return
        self._facility.cancel(self._source)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BeamwireError as failure:
            # The failure that made the caller leave matters more than that of tidying up.
            if error is None:
                raise
            error.add_note(f"the transfer could not be cancelled: {failure.message}")

    def loader(self, **options: Any) -> DataLoader[dict[str, Any] | None]:
        """A DataLoader of these batches; `options` are those of torch, `num_workers` say.

        Takes batches as they are sent, from whichever worker has one. One that insists on the workers' turns
        (`in_order=True`, torch's default) needs `idle`, or waits for a worker that has nothing while others hold the
        rest. Workers are spawned if this process has called a facility by itself: gRPC does not survive a fork.
        """
        chosen: dict[str, Any] = {"batch_size": None, "in_order": False, **options}
        if chosen.get("num_workers") and has_used_grpc():
            chosen.setdefault("multiprocessing_context", "spawn")
        return DataLoader(self, **chosen)

    def receipt(self) -> Receipt | None:
        """Wait for the end of the transfer and return its account; None for a connect string.

        BeamwireError if the transfer did not succeed.
        """
        if not self.transfer:
            return None
        last = self._facility.outcome(self._source)
        if last.state != Transfer.STATE_SUCCEEDED:
            raise failure_of(last)
        return last.receipt

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        """Yield the batches that fall to this worker. Connections are made here, in the process that iterates."""
        try:
            yield from self._batches()
        except BeamwireError as error:
            if get_worker_info() is None:
                raise
            raise WorkerError(f"{_SAYS}{error.reason.name}: {error.message}") from error

    def _batches(self) -> Iterator[dict[str, Any] | None]:
        if not self._opened:
            raise BeamwireError(
                Reason.ILLEGAL_STATE, "the dataset is not open; use `with BeamwireDataset(…) as dataset`, or `open`"
            )
        # The thread is left last: leaving the stream is what ends its waiting.
        with (
            ThreadPoolExecutor(1, thread_name_prefix="beamwire dataset") as thread,
            connect(self._facility.facility, config_dir=self._facility.config_dir) as client,
            client.stream(self._source, **self._options) as stream,
        ):
            for batch in stream if self._idle is None else _with_pauses(stream, self._idle, thread):
                yield as_tensors(batch) if batch is not None else None


def _with_pauses(stream: Stream, seconds: float, thread: ThreadPoolExecutor) -> Iterator[Batch | None]:
    """Yield the batches, and None whenever the next one has not come after so many seconds."""
    batches = iter(stream)
    while True:
        # Not asked for earlier: to ask for the next one says that this one is done with.
        coming = thread.submit(next, batches, None)
        while not wait([coming], timeout=seconds).done:
            yield None
        batch = coming.result()
        if batch is None:
            return
        yield batch


def as_tensors(batch: Batch) -> dict[str, Any]:
    """A batch as a dict of tensors that share its memory; arrays of text stay what they are."""
    found: dict[str, Any] = {_key(name): _tensor(array) for name, array in batch.arrays.items()}
    for name in batch.ragged_fields:
        values, row_offsets = batch.ragged(name)
        found[_key(name)] = _tensor(values)
        found[f"{name}.row_offsets"] = _tensor(row_offsets)
    if batch.media_type:
        found["payload"] = torch.from_numpy(np.frombuffer(batch.payload, np.uint8))
        found["media_type"] = batch.media_type
    found["event_id"] = torch.from_numpy(batch.event_ids)
    return found


def _key(name: str) -> str:
    return f"{name}_" if name.rstrip("_") in _OWN_KEYS else name


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    return torch.from_numpy(array) if array.dtype.kind in _TENSOR_KINDS else array


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if (rank is None) != (world_size is None):
        raise invalid_field("rank", "give rank and world_size both, or neither")
    if rank is None or world_size is None:
        if _distributed():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise invalid_field("rank", f"must be from 0 to {world_size - 1}, not {rank}")
    return rank, world_size


def _agree(transfer_id: str, rank: int, ranks: int) -> str:
    """The id of the transfer on which all ranks agree."""
    if transfer_id:
        return transfer_id
    if ranks == 1:
        return new_id()
    if not _distributed():
        raise invalid_field(
            "transfer_id", f"give all {ranks} ranks the same, or initialise torch.distributed, over which they agree"
        )
    chosen = [new_id() if rank == 0 else ""]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _distributed() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())
