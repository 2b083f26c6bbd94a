"""Sparse autoencoders and transcoders, trained there and then: TopK and BatchTopK.

Sources: TopK, its initialisation and its auxiliary loss: Gao et al. 2024 (arXiv 2406.04093), sections 2.3, A.1 and A.2;
BatchTopK and its threshold for inference: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
Of the pre-activations only the k largest of a token are decoded (`embedding_bag`), so that a step costs two dense
products, encoding and the encoder's gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from elude_runtime.errors import SettingsError

Kind = Literal["TopK", "BatchTopK"]
_AUXILIARY = 1 / 32  # weight of the auxiliary loss
_WARM_UP = 0.05  # part of the steps in which the learning rate rises; then it falls to zero
_CURVE_POINTS = 10
_HELD_OUT, _MOST_HELD_OUT = 0.1, 4000  # part of the tokens that FVU is measured on, and their number at most
_CHUNK_FLOATS = 8_000_000
_SAMPLED = 16  # one of so many


@dataclass(frozen=True)
class SparseConfig:
    """Size and training of one sparse coder.

    latents: L; active: k, latents active at a token (BatchTopK: on average); steps of `batch` tokens (of few tokens, a
    tenth of them) by Adam; rate: the length by which a step changes an encoder or decoder row, which starts at 1: the
    learning rate times the square root of the row's width; it rises over the first 5 % of the steps and then falls to
    zero; dead_steps: a latent that was not active for so many steps is dead and trained by the auxiliary loss;
    auxiliary: whether there is one; seed: of initialisation, held-out tokens and batches.
    """

    kind: Kind
    latents: int
    active: int
    steps: int = 1000
    batch: int = 512
    rate: float = 0.14
    dead_steps: int = 50
    auxiliary: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.latents:
            raise SettingsError(f"{self.active} active latents are not possible with {self.latents} latents.")
        if self.steps < 1 or self.batch < 1 or not self.rate > 0:
            raise SettingsError("Steps and batch must be at least 1, and the learning rate above 0.")


@dataclass(frozen=True, eq=False)
class Scale:
    """Tokens in the units that a coder works in: mean [m] subtracted, divided by one number, so that the mean square
    of a coordinate is 1."""

    mean: Tensor
    size: float

    @classmethod
    def of(cls, values: Tensor) -> Scale:
        """Of tokens [S, m]."""
        mean = values.mean(0)
        rows = max(1, _CHUNK_FLOATS // values.shape[1])
        squares = sum(float((part - mean).square().sum(dtype=torch.float64)) for part in values.split(rows))
        size = (squares / values.numel()) ** 0.5
        return cls(mean, size if size > 0 else 1.0)

    def apply(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.size


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """Sparse codes z [S, L] >= 0 of tokens x, and what they say of y; an autoencoder where y is x, else a transcoder.

        z = act(E (x - mean x) / size x + e)        y^ = mean y + size y (D^T z + b)

    encoder E [L, m], encoder_bias e [L], decoder D [L, o] (rows of unit length), bias b [o]. act keeps the `active`
    largest positive entries of a token (TopK) or, at inference, those above `threshold` (BatchTopK).
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    bias: Tensor
    input: Scale
    output: Scale
    active: int
    threshold: float | None = None

    def encode(self, inputs: Tensor) -> Tensor:
        """[S, m] -> [S, L]"""
        codes = linear(self.input.apply(inputs), self.encoder, self.encoder_bias).relu_()
        if self.threshold is not None:
            return codes.mul_(codes > self.threshold)
        top = codes.topk(self.active, dim=1, sorted=False)
        return torch.zeros_like(codes).scatter_(1, top.indices, top.values)

    def decode(self, codes: Tensor) -> Tensor:
        """[S, L] -> [S, o]"""
        return self.output.mean + self.output.size * (codes @ self.decoder + self.bias)

    def directions(self) -> Tensor:
        """[L, o]: what each latent adds to y^ at activation 1."""
        return self.decoder * self.output.size


@dataclass(frozen=True, eq=False)
class TrainedCoder:
    """A coder with the record of its training. All figures are of tokens that it was not trained on, `held` [H].

    fvu: part of y's variance that y^ leaves unexplained; active: latents active at a token, on average;
    curve: (step, FVU) along the training, the budget curve; seconds: of the training.
    """

    coder: SparseCoder
    config: SparseConfig
    fvu: float
    active: float
    curve: list[tuple[int, float]]
    seconds: float
    held: Tensor


def train(
    inputs: Tensor,
    outputs: Tensor,
    config: SparseConfig,
    encoder: Tensor | None = None,
    report: Callable[[int], None] = lambda steps: None,
) -> TrainedCoder:
    """Train a coder from tokens inputs [S, m] to outputs [S, o]; the same tensor twice makes an autoencoder.

    A tenth of the tokens, drawn at random, is held out (neighbours in the same images are not). BatchTopK's threshold
    is measured on these: on the tokens that a coder was trained on its activations are larger, and a threshold from
    there keeps too many latents elsewhere (of 500 tokens: 54 where 8 were asked for). encoder: linear map
    [o, m] through which the encoder starts as the transpose of the decoder (of an autoencoder, the identity).
    report(steps newly done).
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(inputs), generator=generator)
    held = order[: min(_MOST_HELD_OUT, int(_HELD_OUT * len(order)))]
    rows = order[len(held) :]
    held = held if len(held) else rows  # one token or a few: better measured on what it was trained on than not at all
    with torch.inference_mode(False), torch.no_grad():
        training = _Training(inputs, outputs, config, encoder, generator)
        batch = min(config.batch, max(16, len(rows) // 10))
        every = max(1, config.steps // _CURVE_POINTS)
        curve = []
        queue = rows[:0]
        for step in range(config.steps):
            while len(queue) < batch:
                queue = torch.cat([queue, rows[torch.randperm(len(rows), generator=generator)]])
            training.step(queue[:batch], step)
            queue = queue[batch:]
            if (step + 1) % every == 0:
                curve.append((step + 1, training.fvu(held)))
                report(every)
        report(config.steps % every)
        coder = training.finish(held)
    fvu, active = evaluate(coder, inputs[held], outputs[held])
    if not curve or curve[-1][0] != config.steps:
        curve.append((config.steps, fvu))
    return TrainedCoder(coder, config, fvu, active, curve, time.perf_counter() - start, held)


def evaluate(coder: SparseCoder, inputs: Tensor, outputs: Tensor) -> tuple[float, float]:
    """(fraction of variance unexplained of outputs [S, o], mean number of active latents) at inputs [S, m]"""
    codes = coder.encode(inputs)
    return unexplained(outputs, coder.decode(codes)), float((codes > 0).sum(1).float().mean())


def unexplained(values: Tensor, estimate: Tensor) -> float:
    """FVU: |values - estimate|^2 / |values - mean|^2, [S, o] each. 0 where nothing varies and nothing is missed."""
    missed = float((values - estimate).square().sum(dtype=torch.float64))
    total = float((values - values.mean(0)).square().sum(dtype=torch.float64))
    return missed / total if total > 0 else float(missed > 0)


class _Training:
    """Parameters, optimiser and dead-latent counts of one coder in training."""

    def __init__(
        self, inputs: Tensor, outputs: Tensor, config: SparseConfig, encoder: Tensor | None, generator: torch.Generator
    ) -> None:
        self.config, self.inputs, self.outputs = config, inputs, outputs
        self.input = Scale.of(inputs)
        self.output = self.input if outputs is inputs else Scale.of(outputs)
        decoder = _unit(torch.randn(config.latents, outputs.shape[1], generator=generator))
        start = decoder if encoder is None else _unit(decoder @ encoder)
        self.encoder, self.decoder = start.clone(), decoder
        self.encoder_bias, self.bias = torch.zeros(config.latents), torch.zeros(outputs.shape[1])
        # Adam changes every coordinate by about the learning rate, so a row of n coordinates by sqrt(n) times that
        self.rates = [config.rate / rows.shape[1] ** 0.5 for rows in (self.encoder, self.decoder)]
        groups = [{"params": [self.encoder, self.encoder_bias]}, {"params": [self.decoder, self.bias]}]
        self.optimiser = torch.optim.Adam(groups, lr=config.rate, fused=True)
        self.idle = torch.zeros(config.latents, dtype=torch.int64)  # steps since a latent was last active

    def step(self, rows: Tensor, number: int) -> None:
        """One step of Adam on the tokens `rows` [B]."""
        inputs, target = self._tokens(rows)
        pre = self._encode(inputs)
        error = self._gradients(inputs, target, *self._select(pre))
        dead = (self.idle >= self.config.dead_steps).nonzero()[:, 0]
        if self.config.auxiliary and len(dead):
            self._add_auxiliary(inputs, pre, error, dead)
        grad = self.decoder.grad
        assert grad is not None
        # what only changes a row's length is undone below, and would stay in Adam's moments
        grad.addcmul_((grad * self.decoder).sum(1, keepdim=True), self.decoder, value=-1)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * _schedule(number, self.config.steps)
        self.optimiser.step()
        self.decoder.copy_(_unit(self.decoder))

    def fvu(self, rows: Tensor) -> float:
        """FVU of the tokens `rows` with the parameters of now; BatchTopK takes them as one batch."""
        inputs, target = self._tokens(rows)
        return unexplained(target, self._decode(*self._select(self._encode(inputs)), len(rows)))

    def finish(self, rows: Tensor) -> SparseCoder:
        """The coder, and BatchTopK's threshold: the smallest activation that is kept of the tokens `rows` as one batch
        (the paper takes the mean of that over batches)."""
        coder = SparseCoder(
            self.encoder, self.encoder_bias, self.decoder, self.bias, self.input, self.output, self.config.active
        )
        if self.config.kind == "TopK":
            return coder
        kept = self._select(self._encode(self._tokens(rows)[0]))[2]
        return replace(coder, threshold=float(kept.min()) if len(kept) else 0.0)

    def _gradients(self, inputs: Tensor, target: Tensor, tokens: Tensor, latents: Tensor, values: Tensor) -> Tensor:
        """Set the gradients of the mean squared error, and `idle`; returns the error [B, o]. Written out as sums over
        the few latents that each token keeps: autograd would take the encoder's from a dense product."""
        with torch.enable_grad():
            estimate = self._decode(tokens, latents, values.requires_grad_(), len(inputs))
        error = target - estimate.detach()
        slope = error * (-2 / error.numel())  # of the loss in y^
        (rise,) = torch.autograd.grad(estimate, values, slope)
        values = values.detach()
        rise *= values > 0
        order = latents.argsort(stable=True)
        offsets = torch.searchsorted(latents[order], torch.arange(self.config.latents))

        def by_latent(weights: Tensor, vectors: Tensor) -> Tensor:
            return embedding_bag(tokens[order], vectors, offsets, mode="sum", per_sample_weights=weights[order])

        self.encoder.grad, self.decoder.grad = by_latent(rise, inputs), by_latent(values, slope)
        self.encoder_bias.grad = torch.zeros_like(self.encoder_bias).index_add_(0, latents, rise)
        self.bias.grad = slope.sum(0)
        self.idle += 1
        self.idle[latents[values > 0]] = 0
        return error

    def _add_auxiliary(self, inputs: Tensor, pre: Tensor, error: Tensor, dead: Tensor) -> None:
        """Add the gradients of the auxiliary loss: how much of the error [B, o] the dead latents leave; of each token,
        the o / 2 with the largest activation."""
        values, places = pre[:, dead].topk(min(len(dead), max(1, error.shape[1] // 2)), dim=1, sorted=False)
        codes, decoder = torch.zeros(len(pre), len(dead)).scatter_(1, places, values), self.decoder[dead]
        missed = error - codes @ decoder
        size = error.square().mean().clamp(min=torch.finfo(error.dtype).tiny)
        slope = missed * (-2 * _AUXILIARY / missed.numel() / size)
        rise = (slope @ decoder.T).mul_(codes > 0)
        for parameter, more in (
            (self.encoder, rise.T @ inputs), (self.encoder_bias, rise.sum(0)), (self.decoder, codes.T @ slope),
        ):  # fmt: skip
            assert parameter.grad is not None
            parameter.grad.index_add_(0, dead, more)

    def _tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the coder is given of the tokens `rows`, and what it is to give back: [B, m] and [B, o] in its units."""
        inputs = self.input.apply(self.inputs[rows])
        return inputs, inputs if self.outputs is self.inputs else self.output.apply(self.outputs[rows])

    def _encode(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.encoder, self.encoder_bias).relu_()

    def _select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token, latent and value of the activations that are kept, ordered by token: k of every token [B k], or the
        positive ones among the k B largest of the batch."""
        if self.config.kind == "TopK":
            values, latents = pre.topk(self.config.active, dim=1, sorted=False)
            return torch.arange(len(pre)).repeat_interleave(self.config.active), latents.flatten(), values.flatten()
        flat = pre.flatten()
        kept = _largest(flat, self.config.active * len(pre))
        kept = kept[flat[kept] > 0]
        return kept // pre.shape[1], kept % pre.shape[1], flat[kept]

    def _decode(self, tokens: Tensor, latents: Tensor, values: Tensor, count: int) -> Tensor:
        offsets = torch.searchsorted(tokens, torch.arange(count))
        return embedding_bag(latents, self.decoder, offsets, mode="sum", per_sample_weights=values) + self.bias


def _largest(values: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: the places of the largest of values [n]. Sorting is slow, so only those that are not
    below what a sample says are looked at; where it says too much, all."""
    sample = values[::_SAMPLED]
    floor = sample.topk(min(len(sample), 2 * count // _SAMPLED + 1), sorted=False).values.min()
    near = (values >= floor).nonzero()[:, 0]
    if len(near) < count:
        near = torch.arange(len(values))
    return near[values[near].topk(count, sorted=False).indices.sort().values]


def _schedule(step: int, steps: int) -> float:
    """Part of the learning rate at a step, counted from 0."""
    rise = _WARM_UP * steps
    return min((step + 1) / max(1.0, rise), (steps - step) / max(1.0, steps - rise), 1.0)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
