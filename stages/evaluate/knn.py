"""The k-NN evaluator: a weighted vote of the nearest training images, the same on any number of ranks.

As in DINO (arXiv:2104.14294, `eval_knn.py`): cosine similarity, the k nearest, each with weight
exp(similarity / temperature). The training features go round the ranks in chunks, and every rank keeps the best k of
its own queries, so no rank ever holds more than its share and one chunk.

**Ties.** Similarities are computed in float64 and rounded to multiples of 2^-30, so that how the work is cut up, which
moves the last bits, does not decide. Of equally similar training images the earlier in the split is the nearer. Weights
are whole numbers of 2^-40 of the nearest one's, whose sums are exact; of equal votes the lower class index wins.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster import distributed
from stages.evaluate.config import Knn
from stages.evaluate.features import CHUNK, Features
from stages.evaluate.found import Values

_QUERIES = 1024  # rows of a block of similarities
_ROUNDED = 30  # bits of a similarity after the point
_ROWS = 31  # bits of a training image's number
_WEIGHT = 40  # bits of a weight after the point; 2^22 neighbours of them fit into an int64


def knn(config: Knn, train: Features, query: Features, num_classes: int) -> Values:
    """Yield `knn_top1` (percent) of the queries. Collective: every rank calls it with its shares."""
    predicted_N = predict(train, query, num_classes, k=config.k, temperature=config.temperature)
    hits = distributed.all_reduce_sum((predicted_N == query.y_N).sum())
    yield "knn_top1", 100.0 * int(hits) / query.total


def predict(train: Features, query: Features, num_classes: int, *, k: int, temperature: float) -> Tensor:
    """int64 (queries of this rank,): the class with the highest vote; ties as the module says."""
    q_NC = F.normalize(query.x_NC.double(), dim=1)
    best_NK = query.y_N.new_empty(len(q_NC), 0)  # keys: similarity and training image in one number
    label_NK = query.y_N.new_empty(len(q_NC), 0)
    for first, x_MC, y_M in _everyone(train):
        keys, labels = [], []
        for q in q_NC.split(_QUERIES):
            found = _keys(q @ x_MC.t(), first).topk(min(k, len(x_MC)), dim=1)
            keys.append(found.values)
            labels.append(y_M[found.indices])
        if keys:
            both = torch.cat([best_NK, torch.cat(keys)], 1)
            best_NK, order = both.topk(min(k, both.shape[1]), dim=1)
            label_NK = torch.cat([label_NK, torch.cat(labels)], 1).gather(1, order)
    predicted = [query.y_N.new_empty(0)]
    for keys_BK, label_BK in zip(best_NK.split(_QUERIES), label_NK.split(_QUERIES), strict=True):
        similarity_BK = (keys_BK >> _ROWS).double() / 2**_ROUNDED
        relative_BK = ((similarity_BK - similarity_BK[:, :1]) / temperature).exp()
        votes = label_BK.new_zeros(len(label_BK), num_classes)
        votes.scatter_add_(1, label_BK, (relative_BK * 2**_WEIGHT).round().long())
        predicted.append(_first_of_largest(votes))
    return torch.cat(predicted)


def _keys(similarity_BM: Tensor, first: int) -> Tensor:
    """int64 (B, M), all different in a row: larger for a larger rounded similarity, then for an earlier image."""
    number_M = first + torch.arange(similarity_BM.shape[1], device=similarity_BM.device)
    rounded_BM = (similarity_BM * 2**_ROUNDED).round().long()
    return (rounded_BM << _ROWS) + (2**_ROWS - 1 - number_M)


def _first_of_largest(votes_BC: Tensor) -> Tensor:
    """int64 (B,): the lowest index of a largest value, which `argmax` does not promise."""
    index_C = torch.arange(votes_BC.shape[1], device=votes_BC.device)
    largest_BC = votes_BC == votes_BC.amax(1, keepdim=True)
    return torch.where(largest_BC, index_C, votes_BC.shape[1]).amin(1)


def _everyone(train: Features) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunk by chunk, on every rank: the number of its first image, normalised features (float64), and labels.

    Of all ranks, in the order of the samples.
    """
    number = 0
    for source, rows in enumerate(distributed.gather_objects(len(train.y_N))):
        ours = source == distributed.rank()
        for begin in range(0, rows, CHUNK):
            size = min(CHUNK, rows - begin)
            x_MC = train.x_NC.new_empty(size, train.x_NC.shape[1])
            y_M = train.y_N.new_empty(size)
            if ours:
                x_MC.copy_(train.x_NC[begin : begin + size])
                y_M.copy_(train.y_N[begin : begin + size])
            x_MC = F.normalize(distributed.broadcast(x_MC, source).double(), dim=1)
            yield number, x_MC, distributed.broadcast(y_M, source)
            number += size
