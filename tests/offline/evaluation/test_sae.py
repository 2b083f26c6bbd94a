"""Sparse coders: they recover planted dictionaries, revive dead latents, keep their active count, and agree with a
published implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elude_runtime.errors import SettingsError
from elude_runtime.offline.evaluation.sae import (
    Kind,
    Scale,
    SparseCoder,
    SparseConfig,
    TrainedCoder,
    _largest,
    _schedule,
    _Training,
    train,
    unexplained,
)

KINDS: tuple[Kind, ...] = ("TopK", "BatchTopK")


def planted(count: int = 6000, width: int = 24, atoms: int = 32, active: int = 2) -> tuple[Tensor, Tensor]:
    """(tokens [count, width], dictionary [atoms, width]): sums of `active` atoms with positive weights."""
    g = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, width, generator=g), dim=1)
    chosen = torch.rand(count, atoms, generator=g).topk(active, dim=1).indices
    codes = torch.zeros(count, atoms).scatter(1, chosen, 1 + torch.rand(count, active, generator=g))
    return codes @ dictionary + 0.5, dictionary


def config(kind: Kind = "TopK", latents: int = 48, active: int = 2, steps: int = 600, **rest: object) -> SparseConfig:
    return replace(SparseConfig(kind, latents, active, steps, batch=128), **rest)


@pytest.fixture(scope="module")
def trained() -> dict[Kind, TrainedCoder]:
    tokens, _ = planted()
    return {kind: train(tokens, tokens, config(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_dictionary_is_recovered(kind: Kind, trained: dict[Kind, TrainedCoder]) -> None:
    _, dictionary = planted()
    cosine = dictionary @ trained[kind].coder.decoder.T
    assert float(cosine.amax(1).mean()) > 0.9
    assert trained[kind].fvu < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_says_what_the_coder_does_on_held_out_tokens(kind: Kind, trained: dict[Kind, TrainedCoder]) -> None:
    tokens, _ = planted()
    one = trained[kind]
    held = tokens[one.held]
    codes = one.coder.encode(held)
    assert len(held) == 600 and len(one.held.unique()) == 600
    assert bool((codes >= 0).all())
    assert one.active == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert one.fvu == pytest.approx(unexplained(held, one.coder.decode(codes)))
    steps, curve = zip(*one.curve, strict=True)
    assert steps == tuple(range(60, 601, 60)) and curve[-1] < curve[0] / 2
    assert curve[-1] == pytest.approx(one.fvu, rel=0.2)
    torch.testing.assert_close(one.coder.decoder.norm(dim=1), torch.ones(48))


def test_topk_keeps_at_most_k_latents_of_each_token(trained: dict[Kind, TrainedCoder]) -> None:
    tokens, _ = planted()
    assert int((trained["TopK"].coder.encode(tokens) > 0).sum(1).max()) <= 2


def test_the_threshold_keeps_the_mean_active_count() -> None:
    """Tokens with one or three planted atoms: BatchTopK gives each its own number, k on average."""
    tokens, _ = planted(active=1)
    more, _ = planted(active=3)
    both = torch.cat([tokens, more])
    one = train(both, both, config("BatchTopK"))
    assert one.active == pytest.approx(2, rel=0.1)
    few, many = ((one.coder.encode(part) > 0).sum(1).float().mean() for part in (tokens, more))
    assert float(many) > float(few) + 1


def test_the_active_count_holds_where_a_coder_has_learnt_its_few_tokens_by_heart() -> None:
    tokens = torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    one = train(tokens[:200], tokens[:200], config("BatchTopK", latents=150, active=4, steps=300))
    elsewhere = (one.coder.encode(tokens[200:]) > 0).sum(1).float().mean()
    assert one.active == pytest.approx(4, rel=0.1) and float(elsewhere) == pytest.approx(4, rel=0.4)


def test_an_activation_adds_its_direction() -> None:
    tokens, _ = planted(400)
    coder = train(tokens, tokens, config(steps=20)).coder
    codes = coder.encode(tokens)
    moved = codes.clone()
    moved[:, 3] += 1
    torch.testing.assert_close(coder.decode(moved) - coder.decode(codes), coder.directions()[3].expand(400, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_auxiliary_loss_revives_dead_latents(kind: Kind) -> None:
    """As many latents as atoms, half of them with an encoder that hardly responds: the others win every token."""
    tokens, _ = planted()

    def dead(auxiliary: bool) -> int:
        generator = torch.Generator().manual_seed(0)
        settings = config(kind, latents=32, steps=300, auxiliary=auxiliary, dead_steps=20)
        training = _Training(tokens, tokens, settings, None, generator)
        with torch.no_grad():
            training.encoder[16:] *= 0.02
        for step in range(300):
            training.step(torch.randint(len(tokens), (128,), generator=generator), step)
        return int((training.finish(torch.arange(1000)).encode(tokens) > 0).sum(0).eq(0).sum())

    without, revived = dead(auxiliary=False), dead(auxiliary=True)
    assert without > 12 and revived <= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transcoder", [False, True])
def test_the_gradients_are_those_of_the_loss(kind: Kind, transcoder: bool) -> None:
    """Against autograd through the same loss, with dense codes; a third of the latents is dead."""
    inputs, _ = planted(200)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)) if transcoder else None
    outputs = inputs if weight is None else inputs @ weight.T
    training = _Training(inputs, outputs, config(kind, active=3), weight, torch.Generator().manual_seed(0))
    training.encoder[::3] *= 0.02
    training.idle[::3] = 1000
    given, target = training._tokens(torch.arange(100))
    pre = training._encode(given)
    tokens, latents, values = training._select(pre)
    kept = torch.zeros_like(pre).index_put_((tokens, latents), values) > 0
    error = training._gradients(given, target, tokens, latents, values)
    dead = (training.idle >= 50).nonzero()[:, 0]
    assert 0 < len(dead) < 48
    training._add_auxiliary(given, pre, error, dead)

    parameters = [training.encoder, training.encoder_bias, training.decoder, training.bias]
    encoder, encoder_bias, decoder, bias = copies = [p.clone().requires_grad_() for p in parameters]
    codes = (given @ encoder.T + encoder_bias).relu()
    missed = target - (codes * kept) @ decoder - bias
    ranks = codes[:, dead].argsort(dim=1, descending=True).argsort(dim=1)
    revived = codes[:, dead] * (ranks < target.shape[1] // 2)
    left = (missed.detach() - revived @ decoder[dead]).square().mean() / missed.detach().square().mean()
    (missed.square().mean() + left / 32).backward()
    for own, one in zip(parameters, copies, strict=True):
        assert own.grad is not None and one.grad is not None and bool((one.grad != 0).any())
        torch.testing.assert_close(own.grad, one.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(kind: Kind) -> None:
    tokens, _ = planted(800)
    before = torch.random.get_rng_state()
    first, again, other = (train(tokens, tokens, config(kind, steps=30, seed=s)) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.coder.encoder, again.coder.encoder) and first.curve == again.curve
    assert first.coder.threshold == again.coder.threshold
    assert not torch.equal(first.coder.encoder, other.coder.encoder)


def test_a_transcoder_learns_the_layer() -> None:
    """Codes are read from x and decoded to y = W x: planted atoms show in y as W times themselves."""
    tokens, dictionary = planted()
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    one = train(tokens, tokens @ weight.T, config(), weight)
    assert one.coder.encoder.shape == (48, 24) and one.coder.decoder.shape == (48, 16)
    atoms = torch.nn.functional.normalize(dictionary @ weight.T, dim=1)
    assert float((atoms @ one.coder.decoder.T).amax(1).mean()) > 0.9
    assert one.fvu < 0.15


def test_works_under_inference_mode() -> None:
    with torch.inference_mode():
        tokens, _ = planted(300)
        assert train(tokens, tokens, config(steps=20)).fvu < 1


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind: Kind, count: int) -> None:
    tokens, _ = planted(count)
    one = train(tokens, tokens, config(kind, latents=4, active=1, steps=3))
    assert bool(torch.isfinite(one.coder.encode(tokens)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_never_vary(kind: Kind) -> None:
    tokens = torch.full((50, 6), 2.0)
    one = train(tokens, tokens, config(kind, latents=4, active=1, steps=120, dead_steps=5))
    torch.testing.assert_close(one.coder.decode(one.coder.encode(tokens)), tokens)
    assert one.fvu == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("size", "zeros"), [(1, 0), (20, 0), (5000, 0), (5000, 4900), (5000, 5000)])
def test_the_largest_of_many_are_found(size: int, zeros: int) -> None:
    values = torch.rand(size, generator=torch.Generator().manual_seed(size))
    values[:zeros] = 0
    for count in (1, size // 3 + 1, size):
        found = _largest(values, count)
        assert bool((found.diff() > 0).all())
        assert torch.equal(values[found].sort().values, values.sort().values[-count:])
    uneven = torch.zeros(5000)
    uneven[::16] = 1  # the sample sees nothing else
    assert len(_largest(uneven, 1000)) == 1000 and float(uneven[_largest(uneven, 1000)].sum()) == 313


def test_scale_makes_the_mean_square_one() -> None:
    tokens, _ = planted()
    applied = Scale.of(tokens).apply(tokens)
    assert float(applied.square().mean()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(applied.mean(0), torch.zeros(24), atol=1e-5, rtol=0)


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [_schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == rates[5] == 1
    assert rates[43] == pytest.approx(0.6) and 0 < rates[99] < 0.02
    assert _schedule(0, 1) == 1


@pytest.mark.parametrize(
    "change", [{"active": 0}, {"active": 49}, {"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": float("nan")}]
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        config(**change)  # type: ignore[arg-type]


def test_a_published_library_gives_the_same_codes_and_reconstructions(
    trained: dict[Kind, TrainedCoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: overcomplete's TopK and BatchTopK modules with our weights, in the units that our coder works in."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    # overcomplete 0.3 draws its colour maps when imported, by a name that matplotlib 3.9 took away
    monkeypatch.setattr(pyplot.cm, "get_cmap", pyplot.get_cmap, raising=False)
    published = pytest.importorskip("overcomplete.sae", exc_type=ImportError)
    from overcomplete.sae.modules import TieableEncoder

    tokens, _ = planted(500)

    def theirs(coder: SparseCoder) -> tuple[Tensor, Tensor]:
        reader = TieableEncoder(24, 48, bias=True, weight_init=coder.encoder)
        reader.bias.data.copy_(coder.encoder_bias)
        parts = {"encoder_module": reader, "dictionary_params": {"initializer": coder.decoder}}
        if coder.threshold is None:
            module = published.TopKSAE(24, 48, top_k=coder.active, **parts)
        else:
            module = published.BatchTopKSAE(24, 48, top_k=coder.active * len(tokens), **parts)
            module.running_threshold = torch.tensor(coder.threshold)
        module.eval()
        with torch.no_grad():
            _, codes, decoded = module(coder.input.apply(tokens))
        return codes, coder.output.mean + coder.output.size * (decoded + coder.bias)

    for one in trained.values():
        codes, decoded = theirs(one.coder)
        torch.testing.assert_close(one.coder.encode(tokens), codes)
        torch.testing.assert_close(one.coder.decode(codes), decoded)
        assert int((codes > 0).sum()) > 400
