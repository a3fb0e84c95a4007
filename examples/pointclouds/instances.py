"""From heads to trees: clusters of voxels, and how many of the true trees they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from forest import NONE
from numpy.typing import NDArray
from sklearn.cluster import HDBSCAN
from torch import Tensor
from unet import Cloud, TreeNet

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Clustering:
    """HDBSCAN over voxels that are tree: where their steps point from above, in metres, beside `weight` times their
    embeddings; clusters of fewer than `least` voxels are none."""

    weight: float
    least: int


CLUSTERINGS = tuple(Clustering(weight, least) for weight in (0.0, 0.2) for least in (10, 25))


@torch.no_grad()
def said(model: TreeNet, cloud: Cloud) -> tuple[Labels, Tensor, Tensor]:
    """(voxels that are tree, where their steps point from above, their embeddings)."""
    semantic, step, embedding = model.eval()(cloud.features, cloud.grid)
    tree = (semantic.argmax(1) == 1).nonzero().squeeze(1)
    return tree.numpy(), (cloud.middles + step)[tree, :2], embedding[tree]


def clusters(heads: tuple[Labels, Tensor, Tensor], cloud: Cloud, how: Clustering) -> Labels:
    """The tree of every point, NONE for the others."""
    tree, at, embedding = heads
    out = np.full(len(cloud.middles), NONE)
    if len(tree) > how.least:
        seen = torch.cat([at, how.weight * embedding], dim=1).numpy()
        out[tree] = HDBSCAN(min_cluster_size=how.least, copy=True).fit_predict(seen)
    out[out < 0] = NONE
    return out[cloud.row.numpy()]


def matched(found: Labels, true: Labels) -> tuple[int, int, int]:
    """(pairs of a found and a true tree with more than half of their union in common, found trees, true trees), over
    the same points.  Above one half a tree has one partner at most."""
    a, f = np.unique(found, return_inverse=True)
    b, t = np.unique(true, return_inverse=True)
    common = np.zeros((len(a), len(b)))
    np.add.at(common, (f, t), 1)
    union = common.sum(1, keepdims=True) + common.sum(0, keepdims=True) - common
    pairs = (common / union > 0.5)[a != NONE][:, b != NONE]
    return int(pairs.sum()), int((a != NONE).sum()), int((b != NONE).sum())


def f1(counts: list[tuple[int, int, int]]) -> float:
    """2 pairs / (found + true), summed over plots."""
    pairs, found, true = (sum(column) for column in zip(*counts, strict=True))
    return 2 * pairs / max(found + true, 1)
