"""Made photos with boxes, and a tiny CLIP with its text tower."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from pbe.data import images
from pbe.model.weights import load_exemplar_backbone
from pbe.retrieve.build import Embedder
from tests.tiny_weights import lively

CLASSES = ("Cat", "Dog", "Car")
PHOTOS, WIDTH_PX, HEIGHT_PX = 12, 80, 60
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


def write_photo(folder: Path, number: int) -> None:
    """Coarse random pattern, another one for each number."""
    small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    photo = images.resize(small, width_px=WIDTH_PX, height_px=HEIGHT_PX)
    (folder / f"p{number:02d}.png").write_bytes(images.encode_png(photo))


def write_boxes(path: Path, photos: int) -> None:
    """Two boxes a photo: one of a class that goes round, and a Car."""
    lines = [HEADER]
    for number in range(photos):
        lines.append(f"p{number:02d},made,{CLASSES[number % 2]},1,0.05,0.45,0.1,0.6,0,0,0,0,0")
        lines.append(f"p{number:02d},made,Car,1,0.5,0.95,0.3,0.9,0,0,0,0,0")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with photos/ and boxes.csv."""
    (tmp_path / "photos").mkdir()
    for number in range(PHOTOS):
        write_photo(tmp_path / "photos", number)
    write_boxes(tmp_path / "boxes.csv", PHOTOS)
    return tmp_path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP folder with random weights, as openai/clip-vit-large-patch14 on the hub."""
    return write_whole_clip(tmp_path_factory.mktemp("clip"), seed=1)


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_clip(tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture
def embedder(clip: Path) -> Embedder:
    return embedder_of(clip)


def embedder_of(folder: Path) -> Embedder:
    backbone, pad_px = load_exemplar_backbone(folder)
    return Embedder(backbone, pad_px, torch.device("cpu"), str(folder))


def write_whole_clip(folder: Path, seed: int) -> Path:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = sizes | dict(vocab_size=len(tokens), bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1)
    vision = sizes | dict(image_size=28, patch_size=7)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = lively(CLIPModel(config), seed, scale=0.2)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
