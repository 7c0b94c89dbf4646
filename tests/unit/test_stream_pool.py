"""Pooled memory: used again when nobody looks at it, and never before."""

from __future__ import annotations

import threading

import numpy as np

from beamwire.mesh.stream.pool import BufferPool


def address(block: np.ndarray) -> int:
    return block.ctypes.data


def test_a_block_is_used_again_when_it_is_gone():
    pool = BufferPool()
    block = pool.acquire(100_000)
    first = address(block)
    assert len(block) >= 100_000
    del block
    assert pool.free_count == 1
    assert address(pool.acquire(100_000)) == first


def test_a_view_of_a_view_keeps_the_block():
    pool = BufferPool()
    block = pool.acquire(4096)
    taken = address(block)
    array = np.ndarray((8, 8), "<f4", buffer=block.data[64:], offset=64)
    row = array[1:].reshape(-1)[::2].view("<u4")
    row[:] = 7
    del block, array
    others = [pool.acquire(4096) for _ in range(10)]
    assert taken not in {address(other) for other in others}
    for other in others:
        other[:] = 0
    assert (row == 7).all()
    assert pool.free_count == 0
    del row
    assert pool.free_count == 1


def test_a_memoryview_keeps_the_block():
    pool = BufferPool()
    view = pool.acquire(10).data[3:5]
    assert pool.free_count == 0
    del view
    assert pool.free_count == 1


def test_sizes_do_not_mix_and_spare_blocks_are_bounded():
    pool = BufferPool(spare=2)
    blocks = [pool.acquire(1) for _ in range(5)] + [pool.acquire(3 * 2**20)]
    assert {len(block) for block in blocks} == {64 * 1024, 4 * 2**20}
    del blocks
    assert pool.free_count == 3


def test_threads_never_get_the_same_block():
    pool = BufferPool()
    wrong = []

    def work(mark: int) -> None:
        for _ in range(300):
            block = pool.acquire(64)
            block[:64] = mark
            if not (block[:64] == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
