"""The scores of sets of features: each number against another computation."""

import numpy as np
import pytest
import torch
from fidelity import gaussian, of_few

from ditmoe_ds.evaluation import metrics
from ditmoe_ds.evaluation.metrics import InceptionScore, cmmd, kid, precision_recall
from ditmoe_ds.evaluation.moments import Gaussian, frechet_distance


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that everything here takes several."""
    monkeypatch.setattr(metrics, "BLOCK", 50)


def clouds(n, m, width, shift=0.3):
    """Two sets of vectors that overlap, float32."""
    draw = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width, generator=draw) / width**0.5
    return torch.randn(n, width, generator=draw) @ mix, 1.1 * torch.randn(m, width, generator=draw) @ mix + shift


def test_streamed_moments():
    vectors = clouds(1000, 1, 20)[0] + 1000  # far from zero, where sums of squares lose their digits
    found = gaussian(vectors)
    exact = vectors.double().numpy()
    assert np.allclose(found.mean, exact.mean(0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-10)


def test_frechet_distance_as_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    a, b = (gaussian(x) for x in clouds(500, 400, 64))
    theirs = _compute_fid(a.mean, a.covariance, b.mean, b.covariance).item()
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)
    for i in range(50):  # of equals, some would be less than 0 by rounding
        a = gaussian(torch.randn(30, 8, generator=torch.Generator().manual_seed(i)))
        assert 0 <= frechet_distance(a, a) < 1e-9


def test_frechet_distance_of_singular_covariances():
    x, y = clouds(40, 30, 300)
    a, b = gaussian(x), gaussian(y)
    assert frechet_distance(a, b) == pytest.approx(of_few(x, y), rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    a = Gaussian(torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 0.0]).double()))
    b = Gaussian(torch.tensor([0.0, 2.0]).double(), torch.diag(torch.tensor([9.0, 1.0]).double()))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 3) ** 2 + (0 - 1) ** 2)


def test_inception_score_as_torchmetrics():
    from torchmetrics.image.inception import InceptionScore as Theirs

    logits = 3 * clouds(999, 1, 40)[0]
    theirs = Theirs(feature=torch.nn.Identity(), splits=1)
    theirs.update(logits.double())
    ours = InceptionScore(999, 40)
    ours.add(0, logits[:500])
    ours.add(500, logits[500:])
    assert ours.score() == (pytest.approx(theirs.compute()[0].item(), rel=1e-6), 0)


def test_inception_score_in_splits_of_5000():
    logits = 3 * clouds(11_000, 1, 10)[0]
    ours = InceptionScore(len(logits), 10)
    for first in range(0, len(logits), 64):
        ours.add(first, logits[first : first + 64])
    p = logits.double().softmax(1).numpy()
    scores = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in (p[:5000], p[5000:10_000], p[10_000:])]
    assert ours.score() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_precision_and_recall_directly():
    real, made = clouds(230, 170, 6, shift=0.8)
    x, y = real.double().numpy(), made.double().numpy()

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def covered(points, centres):
        radii = np.sort(distances(centres, centres), 1)[:, 3]  # [0] is itself
        return (distances(points, centres) <= radii).any(1).mean()

    precision, recall = precision_recall(real, made)
    assert (precision, recall) == (covered(y, x), covered(x, y)) and 0.1 < precision < recall < 0.9
    assert precision_recall(real, real) == (1, 1) and precision_recall(real, made + 100) == (0, 0)


def test_kid_as_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = (x.double() for x in clouds(300, 300, 16))
    assert kid(a, b, subsets=2, size=300) == (pytest.approx(poly_mmd(a, b).item(), rel=1e-9), pytest.approx(0, abs=1e-12))


def test_kid_of_subsets_directly():
    a, b = (x.double().numpy() for x in clouds(120, 90, 16))
    rng, found = np.random.RandomState(2020), []
    for _ in range(7):
        x, y = (v[rng.choice(len(v), 50, replace=False)] for v in (a, b))
        pairs = [[(p @ q / 16 + 1) ** 3 for q in x for p in x], [(p @ q / 16 + 1) ** 3 for q in y for p in y]]
        own = sum((sum(k) - sum(k[:: 50 + 1])) / (50 * 49) for k in pairs)
        found.append(own - 2 * np.mean([(p @ q / 16 + 1) ** 3 for q in x for p in y]))
    assert kid(torch.from_numpy(a), torch.from_numpy(b), subsets=7, size=50) == pytest.approx((np.mean(found), np.std(found)), rel=1e-9)


def test_cmmd_directly():
    a, b = (torch.nn.functional.normalize(x, dim=1).double().numpy() for x in clouds(110, 90, 16))

    def mean(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()

    assert cmmd(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
