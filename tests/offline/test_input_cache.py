"""Layer inputs kept on disk by pass one: read back as they were, within a budget that does not depend on who reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import SECOND, VIT_ARGS, VIT_DATA, hook_count, input_tensor, tiny_vit

import elude_runtime as elude
from elude_runtime.errors import StorageError
from elude_runtime.offline import input_cache, passes
from elude_runtime.offline.input_cache import InputCache


def batch(number: int, images: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(number)
    inputs = {"a.b": torch.randn(images, 3, 5, generator=g).to(dtype), "c": torch.randn(images, 7, generator=g)}
    return torch.arange(images) + 4 * number, inputs


def test_what_was_kept_is_read_back(tmp_path: Path) -> None:
    cache = InputCache(tmp_path)
    for number, images, dtype in ((0, 4, torch.float32), (3, 2, torch.bfloat16)):
        cache.add(number, *batch(number, images, dtype))
    assert kept(cache) == {0: [0, 1, 2, 3], 3: [12, 13]}
    assert cache.places(lambda n: n > 0).keys() == {3}  # a process lists its own
    places, inputs = cache.read(3)
    expected = batch(3, 2, torch.bfloat16)
    assert torch.equal(places, expected[0]) and inputs.keys() == expected[1].keys()
    assert all(torch.equal(inputs[n], x) and inputs[n].dtype == x.dtype for n, x in expected[1].items())


def kept(cache: InputCache) -> dict[int, list[int]]:
    return {number: places.tolist() for number, places in cache.places(lambda _: True).items()}


def test_batches_within_the_budget_by_their_places_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_cache, "BUDGET", 2 * 4 * 22 * 4)  # two batches of four images of 22 floats
    mine, others = InputCache(tmp_path / "mine"), InputCache(tmp_path / "others")
    for cache, numbers in ((mine, [0, 1, 2, 3]), (others, [3, 1])):  # another process sees some, in its own order
        cache.folder.mkdir()
        for number in numbers:
            cache.add(number, *batch(number, 1 if number == 1 else 4))  # unreadable images change nothing
    assert kept(mine) == {0: [0, 1, 2, 3], 1: [4]} and kept(others) == {1: [4]}


def test_batches_of_a_loaders_own_size_stay_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = 17 * 128 * 4  # bytes of the layer's input
    monkeypatch.setattr(input_cache, "BUDGET", 8 * image)
    add = InputCache.add

    def noted(cache: InputCache, *args: Any) -> None:
        add(cache, *args)
        used.append(sum(p.stat().st_size for p in cache.folder.glob("inputs.*")))

    for size, expected in ((4, 8 * image), (12, 0)):
        used: list[int] = []
        monkeypatch.setattr(InputCache, "add", noted)
        batches = list(input_tensor(VIT_DATA, 24, 0).split(size))
        elude.rewrite(
            tiny_vit(), batches, out=tmp_path / str(size), layers=[SECOND], subunits=4, concepts=4, tokens=30,
            data_config=VIT_DATA, model_args=VIT_ARGS, batch_size=1,
        )  # fmt: skip
        assert len(used) == 24 // size and expected <= max(used) <= expected + 1000  # with the file's header


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_damaged_batch_counts_as_absent(tmp_path: Path, size: int) -> None:
    cache = InputCache(tmp_path)
    for number in range(2):
        cache.add(number, *batch(number))
    path = tmp_path / "inputs.0"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert kept(cache) == {1: [4, 5, 6, 7]}


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        InputCache(tmp_path / "nowhere").add(0, *batch(0))


@pytest.mark.parametrize("budget", [0, 40_000])
def test_reading_again_gives_the_same_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Nothing kept, or one batch of three, against everything kept: the same tensors; and a second run through the
    network only for what is not there."""
    ran: list[int] = []
    run_layers = passes.run_layers

    def counted(model: Any, layers: Any, batches: Any) -> Any:
        for one in run_layers(model, layers, batches):
            ran.append(len(one[0].places))
            yield one

    monkeypatch.setattr(passes, "run_layers", counted)
    digests = {}
    for name, bytes_kept in (("all", 2**30), ("some", budget)):
        monkeypatch.setattr(input_cache, "BUDGET", bytes_kept)
        ran.clear()
        base = tiny_vit()
        model = elude.rewrite(
            base, input_tensor(VIT_DATA, 12, 0), out=tmp_path / name, layers=[SECOND], subunits=4, concepts=4,
            tokens=30, batch_size=4, data_config=VIT_DATA, model_args=VIT_ARGS,
        )  # fmt: skip
        digests[name] = model.manifest.partition_sha256
        again = {"all": [], "some": [4, 4, 4] if not budget else [4, 4]}[name]
        assert ran == [4, 4, 4, 4, 4, *again]  # eight images for the norm limits
        assert hook_count(base) == 0
    assert digests["all"] == digests["some"]
