"""Extraction keeps order, follows the resize rule and does not depend on the batch size. No wheel needed."""

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pbe.evaluate.features.clip import PROJECTION, load_clip_extractor
from pbe.evaluate.features.dino import load_dino_extractor
from pbe.evaluate.features.extractors import EfficientNetExtractor, Preprocessing, load_inception_extractor
from pbe.evaluate.features.weights import open_extractor, store_extractor
from pbe.evaluate.settings import DinoExtractorConfig
from pbe.model.backbone import EfficientNetLite
from pbe.model.clip import MEAN, STD
from pbe.model.tensors import WeightsError
from pbe.store import Store
from tests.tiny_weights import (
    EXTRACTOR_PX,
    EXTRACTOR_WIDTH,
    write_clip,
    write_clip_extractor,
    write_dino,
    write_inception,
)


class OneConvolution(nn.Module):
    """Random 32 px patches to 1280 channels: the backbone's shapes at a thousandth of its cost."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 1280, 32, stride=32)

    def extract_features(self, images: Tensor) -> Tensor:
        return self.patches(images)


@pytest.fixture(scope="module")
def backbone() -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite(OneConvolution(), name="one_convolution", digest="0" * 16)


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (224, 224), (300, 500), (20, 10), (400, 100)]
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def test_rows_are_the_images_in_order(backbone: EfficientNetLite) -> None:
    images = _images()
    features = EfficientNetExtractor(backbone)(images, batch_rows=2)
    assert features.shape == (5, 1280) and features.dtype == np.float64
    backwards = EfficientNetExtractor(backbone)(images[::-1], batch_rows=2)
    np.testing.assert_allclose(backwards[::-1], features, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "interpolation"),
    [
        ((897, 900), cv2.INTER_AREA),
        ((896, 900), cv2.INTER_LINEAR),  # a quarter is not below a quarter
        ((64, 48), cv2.INTER_LINEAR),
        ((900, 100), cv2.INTER_LINEAR),
    ],
)
def test_the_resize_rule_is_the_documented_one(
    backbone: EfficientNetLite, size: tuple[int, int], interpolation: int
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    squashed = cv2.resize(image, (224, 224), interpolation=interpolation)
    with torch.no_grad():
        expected = backbone(torch.from_numpy(squashed).permute(2, 0, 1)[None])
    np.testing.assert_allclose(EfficientNetExtractor(backbone)([image], batch_rows=1), expected.numpy(), atol=1e-5)
    rule = EfficientNetExtractor(backbone).resize_rule
    assert "INTER_AREA" in rule and "INTER_LINEAR" in rule and str(backbone.input_px) in rule


def test_a_cropped_view_is_accepted(backbone: EfficientNetLite) -> None:
    image = _images()[2]
    view = image[10:200:2, ::-1]
    np.testing.assert_allclose(
        EfficientNetExtractor(backbone)([view], batch_rows=1),
        EfficientNetExtractor(backbone)([view.copy()], batch_rows=1),
        atol=1e-6,
    )


def test_no_images_give_no_rows(backbone: EfficientNetLite) -> None:
    assert EfficientNetExtractor(backbone)([], batch_rows=4).shape == (0, 1280)


def test_bad_input_is_refused(backbone: EfficientNetLite) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        EfficientNetExtractor(backbone)([np.zeros((8, 8, 3), np.float32)], batch_rows=1)
    with pytest.raises(ValueError, match="expected uint8"):
        EfficientNetExtractor(backbone)([np.zeros((8, 0, 3), np.uint8)], batch_rows=1)
    with pytest.raises(ValueError, match="batch_rows"):
        EfficientNetExtractor(backbone)([], batch_rows=0)


# -- CLIP ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_extractor(tmp_path_factory.mktemp("clip") / "extractor")


def test_clip_is_transformers_own_through_its_projection(clip_folder: Path) -> None:
    """Against CLIPVisionModelWithProjection.from_pretrained and torchvision's rule, written out with Pillow."""
    from PIL import Image
    from transformers import CLIPVisionModelWithProjection

    network = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    pictures = _images()
    expected = []
    for picture in pictures:
        image = Image.fromarray(picture)
        scale = EXTRACTOR_PX / min(image.size)
        image = image.resize([max(EXTRACTOR_PX, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - EXTRACTOR_PX) / 2) for side in image.size)
        image = image.crop((left, top, left + EXTRACTOR_PX, top + EXTRACTOR_PX))
        pixels = (np.asarray(image, np.float64) / 255 - MEAN) / STD
        with torch.no_grad():
            out = network(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
        expected.append(out.image_embeds[0].numpy())
    found = load_clip_extractor(clip_folder)(pictures, batch_rows=2)
    assert found.shape == (5, EXTRACTOR_WIDTH)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.ptp(found, axis=0).min() > 1e-4  # it sees differences


@pytest.mark.parametrize("preprocessing", ["whole", "region", "reference"])
@pytest.mark.parametrize("batch_rows", [1, 99])
def test_clips_batch_size_does_not_matter(clip_folder: Path, preprocessing: Preprocessing, batch_rows: int) -> None:
    clip = load_clip_extractor(clip_folder)
    first, second = (clip(_images(), preprocessing=preprocessing, batch_rows=rows) for rows in (batch_rows, 2))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-8)


def test_clip_looks_at_regions_and_references_as_upstream_does(clip_folder: Path) -> None:
    """A square picture of the extractor's own size is the same in all ways; another is squashed, not cropped."""
    clip = load_clip_extractor(clip_folder)
    cut_ways: tuple[Preprocessing, ...] = ("region", "reference")
    own = [np.random.default_rng(0).integers(0, 256, (EXTRACTOR_PX, EXTRACTOR_PX, 3)).astype(np.uint8)]
    whole = clip(own, batch_rows=1)
    for preprocessing in cut_ways:
        np.testing.assert_allclose(clip(own, preprocessing=preprocessing, batch_rows=1), whole, rtol=1e-5)
    wide = np.zeros((EXTRACTOR_PX, 4 * EXTRACTOR_PX, 3), np.uint8)
    changed = wide.copy()
    changed[:, :EXTRACTOR_PX] = 255  # outside the centre crop
    np.testing.assert_array_equal(clip([wide], batch_rows=1), clip([changed], batch_rows=1))
    for preprocessing in cut_ways:
        first, second = (clip([p], preprocessing=preprocessing, batch_rows=1) for p in (wide, changed))
        assert np.abs(first - second).max() > 1e-4


def test_only_the_real_clip_counts_as_the_papers(clip_folder: Path) -> None:
    tiny = load_clip_extractor(clip_folder)
    assert not tiny.paper and not tiny.cmmds_network


def test_a_clip_without_projection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no visual_projection\.weight"):
        load_clip_extractor(write_clip(tmp_path / "clip"))


def test_an_extractor_that_is_not_finite_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    tensors = load_file(clip_folder / "model.safetensors")
    save_file(tensors | {PROJECTION: tensors[PROJECTION] * float("nan")}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"such as {PROJECTION}"):
        load_clip_extractor(tmp_path / "clip")
    save_file(tensors | {PROJECTION: tensors[PROJECTION] * 1e38}, tmp_path / "clip" / "model.safetensors")
    overflows = load_clip_extractor(tmp_path / "clip")
    overflows._network.visual_projection.weight.data *= 1e3
    with pytest.raises(WeightsError, match="NaN or infinite features"):
        overflows(_images(), batch_rows=4)
    network = torch.jit.load(write_inception(tmp_path / "inception.pt"))
    network.convolution.bias.data[0] = float("nan")
    network.save(str(tmp_path / "inception.pt"))
    sha256 = hashlib.sha256((tmp_path / "inception.pt").read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=r"such as convolution\.bias"):
        load_inception_extractor(tmp_path / "inception.pt", sha256=sha256)


# -- DINO ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers", "vit"])
def dino_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("dino") / "extractor", request.param)


def test_dino_is_transformers_own_with_its_preprocessing(dino_folder: Path) -> None:
    """Against AutoModel and AutoImageProcessor, at sizes without half a pixel to crop, which we round to even."""
    from transformers import AutoImageProcessor, AutoModel

    network, processor = AutoModel.from_pretrained(dino_folder).eval(), AutoImageProcessor.from_pretrained(dino_folder)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((64, 48), (224, 224), (300, 600))]
    expected = []
    for picture in pictures:
        with torch.no_grad():
            out = network(**processor(picture, return_tensors="pt"))
        expected.append(out.last_hidden_state[0, 0].numpy())
    dino = load_dino_extractor(dino_folder)
    found = dino(pictures, batch_rows=2)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found, axis=0).min() > 1e-3  # it sees differences
    assert dino.name == "dino" and not dino.paper


def test_dino_crops_what_is_whole_and_squashes_regions_and_references(dino_folder: Path) -> None:
    dino = load_dino_extractor(dino_folder)
    wide = np.zeros((64, 256, 3), np.uint8)
    changed = wide.copy()
    changed[:, :60] = 255  # outside the centre crop
    np.testing.assert_array_equal(dino([wide], batch_rows=1), dino([changed], batch_rows=1))
    squashed = cv2.resize(changed, (224, 224), interpolation=cv2.INTER_LINEAR)
    cut_ways: tuple[Preprocessing, ...] = ("region", "reference")
    for preprocessing in cut_ways:
        found, expected = (dino([p], preprocessing=preprocessing, batch_rows=1) for p in (changed, squashed))
        np.testing.assert_array_equal(found, expected)
        assert np.abs(found - dino([wide], preprocessing=preprocessing, batch_rows=1)).max() > 1e-3


def test_dino_is_stored_by_content_and_read_below_a_classifier(tmp_path: Path) -> None:
    folder, store = write_dino(tmp_path / "dino"), Store(str(tmp_path / "store"))
    entry = store_extractor(store, DinoExtractorConfig(kind="dino", weights=str(folder)))
    opened = open_extractor(store, entry)
    assert opened.digest in entry["path"]
    tensors = load_file(folder / "model.safetensors")
    below = {f"dinov2.{name}": value for name, value in tensors.items()} | {"classifier.bias": torch.zeros(3)}
    save_file(below, folder / "model.safetensors")
    np.testing.assert_array_equal(load_dino_extractor(folder)(_images(), batch_rows=5), opened(_images(), batch_rows=5))


def test_what_is_no_dino_or_does_not_fit_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a clip model; kind dino takes dinov2"):
        load_dino_extractor(clip_folder)
    folder = write_dino(tmp_path / "dino")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def refused(match: str, **changes: object) -> None:
        kept = {key: value for key, value in {**config, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        with pytest.raises(WeightsError, match=match):
            load_dino_extractor(folder)

    refused(r"config\.json lacks num_attention_heads", num_attention_heads=None)
    refused(r"config\.json: .*hidden_size", hidden_size="32")
    refused("patches of 15 px", patch_size=15)
    refused(r"do not fit config\.json: of another shape \d+ such as embeddings", hidden_size=64)
    refused(r"do not fit config\.json: missing \d+ such as encoder\.layer\.2", num_hidden_layers=3)
    tensors["layernorm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    refused(r"1 of \d+ tensors have NaN or infinite values, such as layernorm\.weight")


# -- Inception -----------------------------------------------------------------------------------------------------


def test_inception_is_loaded_when_its_hash_is_right_and_only_then(tmp_path: Path) -> None:
    file = write_inception(tmp_path / "inception.pt")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    features = load_inception_extractor(file, sha256=sha256)(_images(), batch_rows=2)
    assert features.shape == (5, 16)
    network = torch.jit.load(file)
    for picture, row in zip(_images(), features, strict=True):
        alone = network(torch.from_numpy(picture).permute(2, 0, 1)[None], return_features=True)
        np.testing.assert_allclose(row, alone[0].detach().numpy(), rtol=1e-6)
    with pytest.raises(WeightsError, match=f"its SHA-256 is {sha256}, params.yaml expects {'0' * 64}"):
        load_inception_extractor(file, sha256="0" * 64)
    other = tmp_path / "other.pt"
    other.write_bytes(b"no network")
    with pytest.raises(WeightsError, match="not a TorchScript file"):
        load_inception_extractor(other, sha256=hashlib.sha256(b"no network").hexdigest())
    with pytest.raises(WeightsError, match="cannot be read"):
        load_inception_extractor(tmp_path / "none.pt", sha256="0" * 64)
