"""Ranks: about 50 for real photos, lower for noise, between 0 and 100, repeatable."""

import numpy as np
import pytest

from pbe.evaluate.metrics.quality import quality_ranks

CENTRES = 4 * np.random.default_rng(99).standard_normal((3, 24))


def _real(n: int, seed: int) -> np.ndarray:
    """(n, 24): three clusters, as photos of three kinds."""
    rng = np.random.default_rng(seed)
    return CENTRES[rng.integers(3, size=n)] + rng.standard_normal((n, 24))


def _ranks(edits: np.ndarray, seed: int = 0) -> np.ndarray:
    return quality_ranks(
        edits, fit_features=_real(300, 1), real_features=_real(200, 2), components=3, pca_dims=6, seed=seed
    )


def test_real_data_rank_about_50_and_uniformly() -> None:
    ranks = _ranks(_real(400, 3))
    assert ranks.shape == (400,) and ranks.dtype == np.float64
    assert ranks.min() >= 0 and ranks.max() <= 100
    assert ranks.mean() == pytest.approx(50, abs=5)
    np.testing.assert_allclose(np.quantile(ranks, [0.25, 0.75]), [25, 75], atol=8)


def test_real_like_ranks_above_noise() -> None:
    real_like = _real(100, 4)
    blurred = real_like + 1.5 * np.random.default_rng(5).standard_normal(real_like.shape)
    noise = 8 * np.random.default_rng(6).standard_normal(real_like.shape)
    assert _ranks(real_like).mean() > _ranks(blurred).mean() + 10 > _ranks(noise).mean() + 20
    assert _ranks(noise).mean() < 5


def test_the_held_out_photos_rank_50_on_average_exactly() -> None:
    """Each is equal to itself: the middle rank of its tie."""
    assert _ranks(_real(200, 2)).mean() == pytest.approx(50)


def test_same_seed_same_ranks_and_rows_do_not_affect_each_other() -> None:
    edits = _real(50, 7)
    np.testing.assert_array_equal(_ranks(edits), _ranks(edits))
    np.testing.assert_array_equal(_ranks(edits)[10:20], _ranks(edits[10:20]))
    assert _ranks(edits[:0]).shape == (0,)


def test_the_order_of_the_photos_does_not_matter() -> None:
    """Eight components for three clusters: the mixture has many local optima."""
    edits, fit, real = _real(50, 7), _real(120, 1), _real(200, 2)
    shuffled = np.random.default_rng(8).permutation(len(fit))
    first, again = (
        quality_ranks(edits, fit_features=rows, real_features=real, components=8, pca_dims=6, seed=0)
        for rows in (fit, fit[shuffled])
    )
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_the_scale_of_the_features_does_not_matter() -> None:
    edits, fit, real = _real(50, 7), _real(300, 1), _real(200, 2)
    plain = quality_ranks(edits, fit_features=fit, real_features=real, components=3, pca_dims=6, seed=0)
    scaled = quality_ranks(
        edits / 1000, fit_features=fit / 1000, real_features=real / 1000, components=3, pca_dims=6, seed=0
    )
    np.testing.assert_allclose(scaled, plain, atol=1)


def test_few_photos_in_many_dimensions() -> None:
    """The sample profile: tens of photos, 1280 dimensions, more PCA axes asked for than there are."""
    rng = np.random.default_rng(8)
    fit, real, edits = (rng.standard_normal((n, 1280)) for n in (20, 15, 5))
    ranks = quality_ranks(edits, fit_features=fit, real_features=real, components=2, pca_dims=64, seed=0)
    assert ranks.shape == (5,) and np.isfinite(ranks).all()


def test_bad_input_is_refused() -> None:
    good = _real(20, 0)

    def ranks(
        edits: np.ndarray = good,
        fit: np.ndarray = good,
        real: np.ndarray = good,
        components: int = 2,
        pca_dims: int = 4,
    ) -> np.ndarray:
        return quality_ranks(
            edits, fit_features=fit, real_features=real, components=components, pca_dims=pca_dims, seed=0
        )

    with pytest.raises(ValueError, match="edit_features have 3 dimensions, the real ones 24"):
        ranks(edits=good[:, :3])
    with pytest.raises(ValueError, match="all the same"):
        ranks(fit=np.ones_like(good))
    with pytest.raises(ValueError, match="one d"):
        ranks(good[0], good[0], good[0])
    with pytest.raises(ValueError, match="finite"):
        ranks(real=np.full_like(good, np.inf))
    with pytest.raises(ValueError, match="cannot fit 21 components"):
        ranks(components=21)
    with pytest.raises(ValueError, match="pca_dims 0"):
        ranks(pca_dims=0)
    with pytest.raises(ValueError, match="no real_features"):
        ranks(real=good[:0])
