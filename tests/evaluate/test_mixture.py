"""QS against scikit-learn, and the converter against pickles that mean harm."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from pbe.cli.__main__ import main
from pbe.evaluate.import_mixture import import_mixture, mixture_from_pickle
from pbe.evaluate.metrics.mixture import (
    Mixture,
    MixtureError,
    load_mixture,
    log_likelihood,
    quality_scores,
    save_mixture,
)
from tests.memory import in_memory_of

TYPES = ("full", "tied", "diag", "spherical")


def _fitted(covariance_type: str) -> tuple[GaussianMixture, np.ndarray]:
    features = np.random.default_rng(0).standard_normal((300, 5)) * [1, 2, 0.5, 1, 3]
    mixture = GaussianMixture(4, covariance_type=covariance_type, random_state=np.random.RandomState(0)).fit(features)
    return mixture, features


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_converted_mixtures_score_as_scikit_learn(covariance_type: str, protocol: int) -> None:
    theirs, features = _fitted(covariance_type)
    ours = mixture_from_pickle(pickle.dumps(theirs, protocol=protocol), "x.pkl")
    np.testing.assert_allclose(log_likelihood(ours, features), theirs.score_samples(features), rtol=1e-9)


def test_pickles_of_old_versions_are_read() -> None:
    """scikit-learn and numpy renamed their modules; a pickle has the names of its day."""
    theirs, features = _fitted("full")
    data = pickle.dumps(theirs, protocol=2)
    for new, old in ((b"sklearn.mixture._gaussian_mixture", b"sklearn.mixture.gaussian_mixture"),):
        assert new in data
        data = data.replace(new, old)
    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    ours = mixture_from_pickle(data, "x.pkl")
    np.testing.assert_allclose(log_likelihood(ours, features), theirs.score_samples(features), rtol=1e-9)


class _Touch:
    def __init__(self, target: Path, how: Any = os.system) -> None:
        self.target, self.how = target, how

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.how, (f"touch '{self.target}'" if self.how is os.system else f"open('{self.target}', 'w')",)


@pytest.mark.parametrize("how", [os.system, eval, exec])
@pytest.mark.parametrize("wrap", ["bare", "list", "inside"])
def test_a_pickle_that_means_harm_does_nothing(tmp_path: Path, how: Any, wrap: str) -> None:
    harm: Any = _Touch(tmp_path / "touched", how)
    theirs, _ = _fitted("diag")
    theirs.means_ = harm if wrap == "inside" else theirs.means_
    with pytest.raises(MixtureError, match=r"x\.pkl: it imports .*, which a mixture does not need; no code"):
        mixture_from_pickle(pickle.dumps({"bare": harm, "list": [theirs, harm], "inside": theirs}[wrap]), "x.pkl")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_damaged_pickle_never_ends_the_process(protocol: int) -> None:
    """numpy reads the state of a dtype in C: with "M8" for "f8" it ended the process when it was given the real one."""
    theirs, _ = _fitted("diag")
    whole = pickle.dumps(theirs, protocol=protocol)
    with pytest.raises(MixtureError):
        mixture_from_pickle(whole.replace(b"f8", b"M8", 1), "x.pkl")
    with pytest.raises(MixtureError):  # Python 3.11 warns of this escape
        mixture_from_pickle(b"S'\\u'\n.", "x.pkl")
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=2):
            data[at] = rng.integers(256)
        with contextlib.suppress(MixtureError):
            mixture_from_pickle(bytes(data), "x.pkl")


def test_what_is_no_fitted_mixture_is_refused() -> None:
    theirs, _ = _fitted("full")
    whole = pickle.dumps(theirs)
    for data, message in (
        (pickle.dumps({"weights": 1}), "it holds a dict, not scikit-learn's GaussianMixture"),
        (pickle.dumps(GaussianMixture(3)), "never fitted"),
        (whole[: len(whole) // 2], "not a complete pickle of a mixture"),
        (b"", "not a complete pickle"),
        (b"PK\x03\x04 an archive", "not a complete pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ):
        with pytest.raises(MixtureError, match=message):
            mixture_from_pickle(data, "x.pkl")


def test_qs_is_a_clipped_percentage_of_300() -> None:
    np.testing.assert_allclose(quality_scores(np.array([-5.0, 0, 150, 300, 1e9])), [0, 0, 50, 100, 100])


def test_a_file_gives_back_the_mixture_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    theirs, features = _fitted("tied")
    source, out = tmp_path / "gmm.pkl", tmp_path / "mixture.npz"
    source.write_bytes(pickle.dumps(theirs))
    import_mixture(source, out)
    np.testing.assert_allclose(log_likelihood(load_mixture(out), features), theirs.score_samples(features), rtol=1e-9)
    data = bytearray(out.read_bytes())
    at = bytes(data).index(np.ascontiguousarray(theirs.means_).tobytes())
    data[at + 2] ^= 1
    for broken in (bytes(data), bytes(data[:200]), pickle.dumps(theirs)):
        out.write_bytes(broken)
        with pytest.raises(MixtureError, match=r"mixture\.npz: (damaged|not a mixture)"):
            load_mixture(out)
    with pytest.raises(MixtureError, match="no such file; `pbe import-mixture`"):
        load_mixture(tmp_path / "none.npz")


def test_features_of_another_extractor_are_refused() -> None:
    mixture = Mixture(np.ones(1), np.zeros((1, 4)), np.ones((1, 4)), "diag")
    with pytest.raises(MixtureError, match="the mixture has 4 dimensions, so it belongs to another extractor"):
        log_likelihood(mixture, np.zeros((3, 5)))
    with pytest.raises(ValueError, match="finite"):
        log_likelihood(mixture, np.full((3, 4), np.nan))


@pytest.mark.parametrize(
    ("weights", "means", "roots", "message"),
    [
        (np.ones(2) / 2, np.zeros((3, 4)), np.ones((3, 4)), "do not belong together"),
        (np.ones(2), np.zeros((2, 4)), np.ones((2, 4)), "sum to 2"),
        (np.ones(2) / 2, np.zeros((2, 4)), np.ones((2, 3)), "have \\(2, 4\\)"),
        (np.ones(2) / 2, np.full((2, 4), np.nan), np.ones((2, 4)), "finite"),
    ],
)
def test_arrays_that_are_no_mixture_are_refused(
    weights: np.ndarray, means: np.ndarray, roots: np.ndarray, message: str
) -> None:
    with pytest.raises(MixtureError, match=message):
        Mixture(weights, means, roots, "diag")


def test_the_command_says_what_it_found_or_one_line_of_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "gmm.pkl", tmp_path / "mixture.npz"
    source.write_bytes(pickle.dumps(_fitted("full")[0]))
    assert main(["import-mixture", str(source), "--out", str(out)]) == 0
    assert "4 components, 5 dimensions, full covariances" in capsys.readouterr().out
    source.write_bytes(b"nothing")
    assert main(["import-mixture", str(source), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pbe: error: ") and error.count("\n") == 1 and load_mixture(out).means.shape == (4, 5)


def test_saving_writes_no_pickle(tmp_path: Path) -> None:
    save_mixture(tmp_path / "m.npz", Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1), "spherical"), source_sha256="0")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        assert set(arrays) >= {"weights", "means", "precisions_cholesky", "covariance_type"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_changed_byte_takes_no_memory(protocol: int) -> None:
    """A memo index of 2**31 took 18 GiB of Python's own unpickler; so may a length."""
    whole = pickle.dumps(_fitted("diag")[0], protocol=protocol)
    hostile = [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # memo
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",  # a bytearray of 1 TiB
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",  # bytes
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.",  # bytearray(2**32)
    ]
    rng = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        hostile.append(bytes(data))
    messages = []
    with in_memory_of(1 << 28):
        for broken in hostile:
            try:
                mixture_from_pickle(broken, "x.pkl")
            except MixtureError as error:
                messages.append(str(error))
    assert messages and not any("MemoryError" in message for message in messages)
