"""Batches as tensors, and what a dataset knows before it reads."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from beamwire.client.batch import Batch
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged, decode
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FrameHeader

torch = pytest.importorskip("torch", reason="torch is not installed; the extra [torch] has it")

from beamwire.client.torch import BeamwireDataset, as_tensors  # noqa: E402 - it needs torch

REQUEST = {"event_source": {"type": "InternalEventSource"}, "data_sources": {"x": {"type": "IntValue"}}}


def batch_of(arrays, *, media_type: str = "", events: int = 2) -> Batch:
    header = FrameHeader(
        epoch=1,
        kind=FRAME_KIND_DATA,
        sequence=1,
        event_count=events,
        event_ids=[2**63 + number for number in range(events)],
        media_type=media_type,
    )
    writer = FrameWriter()
    message = bytes(writer.encode_opaque(header, arrays) if media_type else writer.encode(header, arrays))[8:]
    memory = BufferPool().acquire(len(message)).data[: len(message)]
    memory[:] = message
    return Batch(decode(memory))


DTYPES = ["|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_becomes_a_tensor_that_shares_the_frame_s_memory(dtype: str) -> None:
    batch = batch_of({"x": np.arange(12).reshape(2, 3, 2).astype(dtype)})
    tensor = as_tensors(batch)["x"]
    assert tensor.shape == (2, 3, 2)
    assert tensor.numpy().dtype == np.dtype(dtype)
    assert np.array_equal(tensor.numpy(), batch["x"])
    assert tensor.data_ptr() == batch["x"].__array_interface__["data"][0], "no copy was made"


def test_text_stays_an_array_and_ids_are_exact() -> None:
    found = as_tensors(batch_of({"who": np.array(["ab", "c"]), "n": np.zeros(2)}))
    assert found["who"].tolist() == ["ab", "c"]
    assert found["event_id"].dtype == torch.uint64
    assert found["event_id"].tolist() == [2**63, 2**63 + 1]
    assert set(found) == {"who", "n", "event_id"}


def test_ragged_fields_come_with_their_row_offsets() -> None:
    ragged = Ragged(np.arange(5, dtype=np.uint16), np.array([0, 2, 5]))
    found = as_tensors(batch_of({"peaks": ragged}))
    assert found["peaks"].tolist() == [0, 1, 2, 3, 4]
    assert found["peaks.row_offsets"].tolist() == [0, 2, 5]


def test_opaque_frames_come_as_bytes() -> None:
    found = as_tensors(batch_of(memoryview(b"abc"), media_type="application/x-hdf5"))
    assert bytes(found["payload"].numpy()) == b"abc"
    assert found["media_type"] == "application/x-hdf5"


@pytest.mark.parametrize("name", ["event_id", "event_id_", "payload", "media_type"])
def test_a_field_with_a_name_of_ours_gets_another(name: str) -> None:
    found = as_tensors(batch_of({name: np.array([7.0, 8.0])}))
    assert found[f"{name}_"].tolist() == [7.0, 8.0]
    assert found["event_id"].tolist() == [2**63, 2**63 + 1]


def test_an_empty_batch_has_empty_tensors() -> None:
    found = as_tensors(batch_of({"x": np.zeros((0, 3), np.float32)}, events=0))
    assert found["x"].shape == (0, 3)
    assert found["event_id"].shape == (0,)


def test_ranks_agree_on_the_transfer_or_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BeamwireError, match="give all 2 ranks the same") as caught:
        BeamwireDataset(REQUEST)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert BeamwireDataset(REQUEST, transfer_id="shared").transfer == "transfers/shared"
    assert BeamwireDataset("transfers/old").transfer == "transfers/old", "a name needs no agreement"
    alone = {BeamwireDataset(REQUEST, rank=0, world_size=1).transfer for _ in range(2)}
    assert len(alone) == 2, "each makes up its own"


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 1), (0, None), (None, 2)])
def test_a_place_that_cannot_be_is_refused(rank, size) -> None:
    with pytest.raises(BeamwireError, match="rank"):
        BeamwireDataset("transfers/x", rank=rank, world_size=size)


def test_a_dataset_can_be_pickled_and_must_be_opened(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(BeamwireDataset(REQUEST, transfer_id="t1", group="g", config_dir=tmp_path)))
    assert dataset.transfer == "transfers/t1"
    with pytest.raises(BeamwireError, match="use `with BeamwireDataset"):
        next(iter(dataset))


def test_who_is_not_enrolled_is_told_before_a_worker_starts(tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match="beamwire enroll"), BeamwireDataset(REQUEST, config_dir=tmp_path):
        pytest.fail("there is no facility")


def test_the_loader_takes_batches_from_whoever_has_one() -> None:
    loader = BeamwireDataset("transfers/x").loader(num_workers=2)
    assert loader.batch_size is None
    assert loader.in_order is False
    assert loader.num_workers == 2
