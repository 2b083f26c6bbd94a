"""Lossy baselines that look for directions: independent components, k-means directions, read-outs of the logits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from elude_runtime.offline.evaluation.calibration import (
    CalibrationTokens,
    principal_axes,
    read_set,
    reading,
    written_set,
)
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.partition.kmeans import kmeans

_RANK = 1e-6  # a principal component with a smaller part of the first one's variance is rounding
_ICA_ITERATIONS, _ICA_TOKENS = 200, 10_000  # at most: an iteration passes over all tokens
_RIDGE = 0.01  # in units of a standardised input's variance


def independent_components(
    tokens: CalibrationTokens, components: int, sample: Tensor, seed: int, of: str = "y"
) -> FeatureSet:
    """Independent components of y or of x (`of`), by FastICA (Hyvärinen 1999; scikit-learn, logcosh) on the first
    `components` principal components of tokens out of `sample`. The write of a component: its column of the mixing
    matrix, of x through W. What lies outside the principal components is lost (`fvu`, of y)."""
    sample = sample[torch.linspace(0, len(sample) - 1, min(len(sample), _ICA_TOKENS)).long()]
    values = tokens.outputs[sample] if of == "y" else tokens.inputs[sample]
    axes, variances = principal_axes(values)
    number = int((variances > _RANK * variances[0]).sum().clamp(max=min(components, len(sample) - 1)))
    axes, deviations = axes[:number], variances[:number].sqrt()
    whitened = ((values - values.mean(0)).double() @ axes.T / deviations).float()
    turn, facts = _unmix(whitened, seed)
    readout, mixing = (turn / deviations @ axes).float(), (turn * deviations @ axes).float()
    if of == "y":
        readout = readout @ tokens.weight
    else:
        mixing = mixing @ tokens.weight.T
    raw, mean_output = reading(tokens, readout), tokens.weight @ tokens.mean
    found = written_set(
        tokens, f"ICA of {of}", raw, mixing, reconstruct=lambda inputs: raw(inputs) @ mixing + mean_output, **facts
    )
    found.facts["fvu"] = 1 - float(found.share.sum())
    return found


def _unmix(whitened: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """(orthogonal float64 [n, n] that turns whitened tokens [S, n] into independent components, how it was found)"""
    if not whitened.shape[1]:  # nothing varies
        return torch.zeros(0, 0, dtype=torch.float64), {}
    ica = FastICA(whiten=False, random_state=seed, max_iter=_ICA_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ica.fit(whitened.numpy())
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return torch.from_numpy(ica.components_).double(), {"iterations": int(ica.n_iter_), "converged": converged}


def kmeans_directions(tokens: CalibrationTokens, clusters: int, sample: Tensor, seed: int) -> FeatureSet:
    """k-means directions of x: clusters of standardised tokens of unit length, each read by its centroid minus the
    mean of all, linearly. No decomposition: the directions overlap, leave parts of x out and write nothing."""
    points = tokens.standardised(sample)
    points /= points.norm(dim=1, keepdim=True).clamp(min=torch.finfo(points.dtype).tiny)
    number = min(clusters, len(points))
    draws = torch.rand(1, number, generator=torch.Generator().manual_seed(seed))
    labels, centres = kmeans(points[None], number, draws)
    readout = (centres[0] - points.mean(0)) / tokens.std
    sizes = torch.bincount(labels[0], minlength=number).tolist()
    return read_set(tokens, "k-means directions of x", reading(tokens, readout), sizes=sizes)


def logit_directions(tokens: CalibrationTokens, directions: int, sample: Tensor, logits: Tensor) -> FeatureSet:
    """Control: what of the network's own answer can be read at the layer. The first principal components of the logits
    [S, C] (of each token its image's), read from x by ridge regression. No decomposition either."""
    target = logits[sample].float()
    axes, variances = principal_axes(target)
    number = int((variances > _RANK * variances[0]).sum().clamp(min=1, max=directions))
    scores = ((target - target.mean(0)).double() @ axes[:number].T).float()
    points = tokens.standardised(sample)
    gram = (points.T @ points).double() / len(points)
    gram += _RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram, (points.T @ scores).double() / len(points))  # [m, number]
    return read_set(tokens, "directions read for the logits", reading(tokens, solved.T.float() / tokens.std))
