"""The explicit form of whole networks."""

from __future__ import annotations

import copy

import torch
from conftest import Rewritten

from elude_runtime.network.explicit import ExplicitLayer


def test_it_gives_the_base_models_output(rewritten: Rewritten) -> None:
    wide = rewritten.model.explicit()
    for name in rewritten.model.layers:
        assert isinstance(wide.get_submodule(name), ExplicitLayer)
    x, base = rewritten.images.double(), copy.deepcopy(rewritten.base).double()
    with torch.no_grad():
        expected, found = base(x), copy.deepcopy(wide).double()(x)
        single = wide(rewritten.images)
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-12
    torch.testing.assert_close(single, rewritten.base(rewritten.images), rtol=1e-3, atol=1e-4)


def test_its_neurons_are_the_subunits(rewritten: Rewritten) -> None:
    wide = rewritten.model.explicit()
    seen: list[torch.Tensor] = []
    wide.get_submodule(f"{rewritten.layer}.subunits").register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        wide(rewritten.images)
    expected = rewritten.model.subunits(rewritten.images, rewritten.layer)
    torch.testing.assert_close(seen[0], expected.flatten(2), rtol=1e-3, atol=1e-4)


def test_the_original_stays_as_it_is(rewritten: Rewritten) -> None:
    before = rewritten.model(rewritten.images)
    wide = rewritten.model.explicit()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    assert torch.equal(rewritten.model(rewritten.images), before)
