"""LPIPS, version 0.1 (Zhang et al. 2018): how different two pictures look to a network, 0 for equal ones.

The original is richzhang/PerceptualSimilarity, lpips/lpips.py; it imports torchvision, which is not needed here.
Weights come from two files: torchvision's state_dict of AlexNet or VGG16, and the heads that the original brings
(lpips/weights/v0.1/alex.pth, vgg.pth). Layers are numbered as torchvision's `features`.
"""

import hashlib
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pbe.data.schema import LpipsNet
from pbe.errors import UserError
from pbe.evaluate.metrics.background import fill_hole
from pbe.model.tensors import WeightsError, check_fit, new_loaded, read_tensors, refuse_non_finite

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the original's ScalingLayer, of pixels in [-1, 1]
_HEAD = re.compile(r"lin(\d)\.model\.1\.weight")  # 0 of its model is a dropout
_EPSILON = 1e-10  # the original's normalize_tensor
# after which layers features are compared, and the least side at which all of these have a pixel
_TAPS: dict[LpipsNet, tuple[int, ...]] = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_WIDTHS: dict[LpipsNet, tuple[int, ...]] = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_LEAST_PX: dict[LpipsNet, int] = {"alex": 31, "vgg": 16}


class Lpips(nn.Module):
    """Backbone and heads, in eval mode, float32, without gradients. digest: of the weights."""

    def __init__(self, net: LpipsNet) -> None:
        super().__init__()
        self.net, self.digest = net, ""
        self.features = _alexnet() if net == "alex" else _vgg16()
        self.heads = nn.ModuleList([nn.Conv2d(width, 1, 1, bias=False) for width in _WIDTHS[net]])
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """(1 + N, 3, H, W) float32 in [0, 1] to (N,): distances of the first one to each of the others."""
        shift, scale = (pictures.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x = (2 * pictures - 1 - shift) / scale
        distance = pictures.new_zeros(len(pictures) - 1)
        for (start, end), head in zip(pairwise((-1, *_TAPS[self.net])), self.heads, strict=True):
            x = self.features[start + 1 : end + 1](x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + _EPSILON)
            distance = distance + head((unit[1:] - unit[:1]).square()).mean((1, 2, 3))
        return distance

    def of_edit(self, edit: np.ndarray, photo: np.ndarray, hole_mask: np.ndarray) -> tuple[float, float]:
        """LPIPS of background and hole: of the photo with the edit's pixels there alone. Over the whole picture, so a
        small hole has a small share in it.

        Takes images (H, W, 3) uint8 RGB and hole_mask (H, W), non-zero where the edit went. Raises ValueError like
        `fill_hole`, UserError for pictures too small for the network.
        """
        changed = [fill_hole(edit, photo, hole_mask), fill_hole(photo, edit, hole_mask)]
        if min(photo.shape[:2]) < _LEAST_PX[self.net]:
            raise UserError(
                f"evaluate.lpips: {self.net} takes pictures of {_LEAST_PX[self.net]} px or more, not "
                f"{photo.shape[1]} x {photo.shape[0]}; set it to null"
            )
        found = [0.0, 0.0]
        if differ := [index for index, picture in enumerate(changed) if not np.array_equal(picture, photo)]:
            rows = np.stack([photo, *(changed[index] for index in differ)])
            pixels = torch.from_numpy(rows).permute(0, 3, 1, 2).to(next(self.parameters()).device)
            with torch.no_grad():
                distances = self(pixels.float() / 255)
            for index, value in zip(differ, distances.tolist(), strict=True):
                found[index] = value
        return found[0], found[1]


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for depth, wider in zip((2, 2, 3, 3, 3), _WIDTHS["vgg"], strict=True):
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            width = wider
    return nn.Sequential(*layers)


def load_lpips(net: LpipsNet, backbone: Path, heads: Path) -> Lpips:
    """Load torchvision's weights of the network, and the original's of the heads. Raises WeightsError."""
    with torch.device("meta"):
        own = Lpips(net).state_dict()
    below = {name: value for name, value in read_tensors(backbone).items() if name.startswith("features.")}
    above = {_HEAD.sub(r"heads.\1.weight", name): value for name, value in read_tensors(heads).items()}
    for part, tensors, file in (("features.", below, backbone), ("heads.", above, heads)):
        check_fit({name: value for name, value in own.items() if name.startswith(part)}, tensors, str(file))
        refuse_non_finite(tensors, str(file))
    return _loaded(net, below | above, f"{backbone} and {heads}")


def lpips_bytes(lpips: Lpips) -> bytes:
    """The weights as safetensors, for `lpips_from_bytes`."""
    return safetensors.torch.save(lpips.state_dict())


def lpips_from_bytes(data: bytes, net: LpipsNet, where: str) -> Lpips:
    """where: for messages. Raises WeightsError."""
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise WeightsError(f"{where}: damaged or incomplete weight file ({error})") from None
    return _loaded(net, tensors, where)


def _loaded(net: LpipsNet, tensors: Mapping[str, Tensor], where: str) -> Lpips:
    lpips = new_loaded(lambda: Lpips(net), tensors, where)
    lpips.digest = hashlib.sha256(lpips_bytes(lpips)).hexdigest()[:16]
    return lpips
