"""Layer inputs kept on disk by pass one: read back as they were, within a budget that does not depend on who reads."""

from __future__ import annotations

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
    cache = InputCache(tmp_path, 4)
    for number, images, dtype in ((0, 4, torch.float32), (3, 2, torch.bfloat16)):
        cache.add(number, *batch(number, images, dtype))
    assert cache.numbers() == [0, 3]
    assert cache.places([0, 3]).tolist() == [0, 1, 2, 3, 12, 13] and cache.places([]).dtype == torch.int64
    places, inputs = cache.read(3)
    expected = batch(3, 2, torch.bfloat16)
    assert torch.equal(places, expected[0]) and inputs.keys() == expected[1].keys()
    assert all(torch.equal(inputs[n], x) and inputs[n].dtype == x.dtype for n, x in expected[1].items())


def test_batches_within_the_budget_by_their_number_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_cache, "BUDGET", 2 * 4 * 22 * 4)  # two batches of four images of 22 floats
    mine, others = InputCache(tmp_path / "mine", 4), InputCache(tmp_path / "others", 4)
    for cache, numbers in ((mine, [0, 1, 2, 3]), (others, [3, 1])):  # another process sees some, in its own order
        cache.folder.mkdir()
        for number in numbers:
            cache.add(number, *batch(number, 1 if number == 1 else 4))  # unreadable images change nothing
    assert mine.numbers() == [0, 1] and others.numbers() == [1]


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        InputCache(tmp_path / "nowhere", 4).add(0, *batch(0))


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
