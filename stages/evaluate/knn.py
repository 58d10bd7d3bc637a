"""The k-NN evaluator: a weighted vote of the nearest training images, exact on any number of ranks.

As in DINO (arXiv:2104.14294, `eval_knn.py`): cosine similarity, the k nearest, each with weight
exp(similarity / temperature). The training features go round the ranks in chunks, and every rank keeps the best k of
its own queries, so no rank ever holds more than its share and one chunk.
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


def knn(config: Knn, train: Features, query: Features, num_classes: int) -> Values:
    """Yield `knn_top1` (percent) of the queries. Collective: every rank calls it with its shares."""
    predicted_N = predict(train, query, num_classes, k=config.k, temperature=config.temperature)
    hits = distributed.all_reduce_sum((predicted_N == query.y_N).sum())
    yield "knn_top1", 100.0 * int(hits) / query.total


def predict(train: Features, query: Features, num_classes: int, *, k: int, temperature: float) -> Tensor:
    """int64 (queries of this rank,): the class with the highest vote; of equal votes the lower class index."""
    q_NC = F.normalize(query.x_NC, dim=1)
    best_NK = q_NC.new_empty(len(q_NC), 0)
    label_NK = query.y_N.new_empty(len(q_NC), 0)
    for x_MC, y_M in _everyone(train):
        similarity, labels = [], []
        for q in q_NC.split(_QUERIES):
            found = (q @ x_MC.t()).topk(min(k, len(x_MC)), dim=1)
            similarity.append(found.values)
            labels.append(y_M[found.indices])
        if similarity:
            both = torch.cat([best_NK, torch.cat(similarity)], 1)
            # Stable: of equal similarities the earlier sample stays, on any number of ranks.
            best_NK, order = both.sort(dim=1, descending=True, stable=True)
            best_NK = best_NK[:, :k]
            label_NK = torch.cat([label_NK, torch.cat(labels)], 1).gather(1, order[:, :k])
    predicted = [query.y_N.new_empty(0)]
    for best, label in zip(best_NK.split(_QUERIES), label_NK.split(_QUERIES), strict=True):
        votes = torch.zeros(len(best), num_classes, dtype=torch.float64, device=best.device)
        votes.scatter_add_(1, label, (best.double() / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def _everyone(train: Features) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised features and labels of all ranks in the order of the samples, chunk by chunk, on every rank."""
    for source, rows in enumerate(distributed.gather_objects(len(train.y_N))):
        ours = source == distributed.rank()
        for begin in range(0, rows, CHUNK):
            size = min(CHUNK, rows - begin)
            x_MC = train.x_NC.new_empty(size, train.x_NC.shape[1])
            y_M = train.y_N.new_empty(size)
            if ours:
                x_MC.copy_(F.normalize(train.x_NC[begin : begin + size], dim=1))
                y_M.copy_(train.y_N[begin : begin + size])
            yield distributed.broadcast(x_MC, source), distributed.broadcast(y_M, source)
