"""The file of chosen tokens: what was written is read back, whatever the order and whoever wrote it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elude_runtime.offline.token_store import TokenStore


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 6), groups=st.sampled_from([1, 2]))
def test_tokens_are_read_back_by_id(
    tmp_path_factory: pytest.TempPathFactory, seed: int, batch: int, groups: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    reads = torch.randn(6, 5, groups, 2, 3, generator=g)
    ids = torch.randint(0, 30, (4, 3), generator=g)
    path = tmp_path_factory.mktemp("tokens") / "a"
    writers = [TokenStore(path, ids.flatten(), (groups, 2, 3)) for _ in range(2)]  # as two processes have them
    for store in writers:
        store.allocate()
    for number, first in enumerate(range(0, 6, batch)):
        places = torch.arange(first, min(first + batch, 6))
        writers[number % 2].add(places, reads[places])
    flat = reads.flatten(0, 1)
    for store in writers:
        assert torch.equal(store.read(ids), flat[ids])
        assert torch.equal(store.read(ids[0]), flat[ids[0]])
        of = torch.randint(0, groups, (4,), generator=g)
        assert torch.equal(store.read(ids, of), flat[ids, of[:, None]])
        store.close()


def test_the_images_that_hold_chosen_tokens(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "a", torch.tensor([31, 7, 30, 8, 7]), (1, 1, 1))
    assert store.places(10).tolist() == [0, 3]
    store.add(torch.tensor([0, 2, 3]), torch.arange(40.0).reshape(4, 10, 1, 1, 1)[[0, 2, 3]])  # place 1 is unreadable
    assert store.read(torch.tensor([7, 30, 31]))[:, 0, 0, 0].tolist() == [7, 30, 31]
    store.close()


def test_the_file_takes_its_place_at_once(tmp_path: Path) -> None:
    """Also on the disk, so that it cannot run full later; only then it counts as whole, and what is in it stays."""
    path, shape = tmp_path / "a", (2, 8, 1)
    for whole in (False, True):
        store = TokenStore(path, torch.arange(1000), shape)
        assert store.whole == whole
        store.allocate()
        facts = os.stat(path)
        assert facts.st_size == 1000 * 16 * 4
        assert facts.st_blocks * 512 >= facts.st_size or not hasattr(os, "posix_fallocate")
        if not whole:
            store.add(torch.arange(10), torch.arange(16000.0).reshape(10, 100, *shape))
        assert store.read(torch.tensor([999])).flatten().tolist() == list(range(15984, 16000))
        store.close()
    os.truncate(path, 5000)
    store = TokenStore(path, torch.arange(1000), shape)
    assert not store.whole
    store.close()
