"""k-NN and linear probe on frozen features equal scikit-learn, with features of any checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from cluster.errors import DataInvalid
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.evaluate import features as chunking
from stages.evaluate import knn as neighbours
from stages.evaluate.config import Linear
from stages.evaluate.features import Features
from stages.evaluate.linear import LinearProbe
from stages.evaluate.setting import HALF
from stages.evaluate.stage import run
from stages.model import load
from tests.stages.evaluate import models
from tests.stages.images import shard_folder, write_image_folder

CLASSES = 5


def blobs(rows: int, seed: int, width: int = 8) -> Features:
    """Overlapping clouds, one for each class, so that nothing is separable."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    x = centres[labels] + rng.normal(size=(rows, width)) * 1.5 + 3.0
    return Features(torch.tensor(x, dtype=torch.float32), torch.tensor(labels), rows)


@pytest.mark.parametrize("chunk", [16, 10_000], ids=["in pieces", "at once"])
def test_knn_equals_scikit_learn(monkeypatch, chunk):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    monkeypatch.setattr(neighbours, "_QUERIES", min(chunk, 1024))
    train, query = blobs(203, 1), blobs(61, 2)
    found = neighbours.predict(train, query, CLASSES, k=20, temperature=0.07)
    judge = KNeighborsClassifier(
        n_neighbors=20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    )
    judge.fit(train.x_NC.double().numpy(), train.y_N.numpy())
    expected = judge.predict(query.x_NC.double().numpy())
    assert found.tolist() == expected.tolist()
    assert 0.3 < (expected == query.y_N.numpy()).mean() < 1


def twins(rows: int, classes: int) -> tuple[Features, Features]:
    """Every training image three times or more, with other labels: neighbours and votes are tied everywhere."""
    few = blobs(7, 1).x_NC
    rng = np.random.default_rng(5)
    x, y = few[torch.tensor(rng.integers(0, 7, rows))], torch.tensor(rng.integers(0, classes, rows))
    # The same direction at another length is as similar, whatever the last bit of a float32 says.
    return Features(x * torch.tensor(rng.uniform(0.5, 2, (rows, 1)), dtype=torch.float32), y, rows), blobs(
        61, 2
    )


@pytest.mark.parametrize("chunk", [5, 64, 10_000])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_knn_breaks_ties_by_its_rule_however_it_is_cut(monkeypatch, k, chunk):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    monkeypatch.setattr(neighbours, "_QUERIES", chunk)
    train, query = twins(300, CLASSES)
    found = neighbours.predict(train, query, CLASSES, k=k, temperature=0.07)
    x, q = (f.x_NC.double().numpy() for f in (train, query))
    x, q = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, q))
    for row, similarity in enumerate(np.rint(q @ x.T * 2**30).astype(int)):
        nearest = sorted(range(300), key=lambda i: (-similarity[i], i))[:k]  # the earlier of equal ones
        votes = np.zeros(CLASSES, dtype=int)
        for i in nearest:
            weight = np.exp((similarity[i] - similarity[nearest[0]]) / 2**30 / 0.07)
            votes[train.y_N[i]] += int(np.rint(weight * 2**40))
        assert found[row] == votes.argmax(), "numpy's argmax is the first: the lower class index"


def test_knn_breaks_tied_votes_as_scikit_learn():
    """It leaves open which of tied neighbours are among the k; here there are k in all, and they tie in votes."""
    labels = [4, 2, 3, 2, 4, 3]
    x = torch.tensor([[3.0, 4.0]] * 6)
    train = Features(x, torch.tensor(labels), 6)
    query = Features(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 0]), 2)
    found = neighbours.predict(train, query, CLASSES, k=6, temperature=0.07)
    judge = KNeighborsClassifier(
        n_neighbors=6,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    )
    judge.fit(x.numpy(), labels)
    assert found.tolist() == judge.predict(query.x_NC.numpy()).tolist() == [2, 2]


def test_knn_of_fewer_images_than_neighbours_takes_them_all():
    train, query = blobs(7, 1), blobs(9, 2)
    assert len(neighbours.predict(train, query, CLASSES, k=20, temperature=0.07)) == 9


@pytest.mark.parametrize("chunk", [32, 10_000], ids=["in pieces", "at once"])
def test_linear_probe_equals_scikit_learn(monkeypatch, chunk):
    monkeypatch.setattr(chunking, "CHUNK", chunk)
    train, query, l2 = blobs(203, 1), blobs(61, 2), 0.02
    probe = LinearProbe(Linear(l2=l2), train, CLASSES)
    scaler = StandardScaler().fit(train.x_NC.double().numpy())
    judge = LogisticRegression(C=1 / (l2 * 203), tol=1e-10, max_iter=10_000)
    judge.fit(scaler.transform(train.x_NC.double().numpy()), train.y_N.numpy())
    assert probe.weight_CK.t().numpy() == pytest.approx(judge.coef_, abs=1e-5)
    wanted = judge.predict_log_proba(scaler.transform(query.x_NC.double().numpy()))
    assert probe.logits(query.x_NC).log_softmax(1).numpy() == pytest.approx(wanted, abs=1e-5)
    score = 100 * judge.score(scaler.transform(query.x_NC.double().numpy()), query.y_N.numpy())
    assert dict(probe.values(query))["linear_top1"] == pytest.approx(score)
    assert not probe.notes()


def test_linear_probe_that_is_cut_short_says_so():
    probe = LinearProbe(Linear(l2=1e-4, max_iterations=2), blobs(50, 1), CLASSES)
    assert "raise max_iterations" in probe.notes()[0]


def test_constant_features_do_no_harm():
    train = blobs(50, 1)
    train.x_NC[:, 3] = 4.0
    assert torch.isfinite(LinearProbe(Linear(), train, CLASSES).weight_CK).all()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    images = write_image_folder(tmp_path_factory.mktemp("images"), classes=CLASSES, train=6, val=3)
    return shard_folder(images, tmp_path_factory.mktemp("shards"), shard_samples=8)


@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_features_are_the_mean_final_tokens_of_any_checkpoint(dataset, tmp_path, task):
    if task == "pretrain":
        checkpoint, inputs = models.save_pretrained(tmp_path, dataset), HALF
    else:
        checkpoint, inputs = models.save_classifier(tmp_path, dataset, CLASSES), models.IMAGENET
    config = models.config({"kind": "knn", "k": 3}, {"kind": "linear", "l2": 0.1})
    outcome = run(
        config, {"data": dataset, "checkpoint": checkpoint}, StageContext(out=str(tmp_path / "out"))
    )
    shares = {}
    for split in ("train", "val"):
        images, labels = models.images_and_labels(dataset, split, normalisation=inputs)
        with torch.no_grad():
            tokens = load(checkpoint.uri).forward_features(images)["tokens"]
        shares[split] = Features(tokens.mean(1), labels, len(labels))
    near = neighbours.predict(shares["train"], shares["val"], CLASSES, k=3, temperature=0.07)
    probe = LinearProbe(Linear(l2=0.1), shares["train"], CLASSES)
    assert outcome.metrics == pytest.approx(
        {
            "knn_top1": 100 * (near == shares["val"].y_N).double().mean().item(),
            **dict(probe.values(shares["val"])),
        }
    )
    assert outcome.artifact.measurements[0].samples == 15 and not outcome.files


def test_data_without_a_train_split_cannot_be_probed(tmp_path):
    images = write_image_folder(tmp_path / "images", classes=2, train=2, val=2)
    only_val = shard_folder(images, tmp_path / "shards", splits=("val",))
    checkpoint = models.save_pretrained(tmp_path / "model", only_val)
    with pytest.raises(DataInvalid, match="no split 'train'"):
        run(
            models.config({"kind": "knn"}),
            {"data": only_val, "checkpoint": checkpoint},
            StageContext(out=str(tmp_path)),
        )
