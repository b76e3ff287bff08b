"""The frozen text encoder of a model that is conditioned on captions: CLIP's text model, or a sentence encoder.

Stable Diffusion's conditioning: the last hidden states of CLIP ViT-L/14's text model, 77 x 768, padded with the end
token. Upstream: ldm/modules/encoders/modules.py, `FrozenCLIPEmbedder`. A sentence encoder's states at padding are 0.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from pbe.errors import UserError, one_line
from pbe.model.hub import part_folder
from pbe.model.tensors import WeightsError, new_loaded, read_folder, read_json, refuse_non_finite

PARTS = ("text_encoder", "tokenizer")  # of a folder in diffusers' layout; elsewhere both lie in the folder itself
MAX_TOKENS = 77  # CLIP's, and the most of any encoder: cross-attention pays for each
CACHED_CAPTIONS = 512  # labels and colours give few; 120 MB at 77 x 768
_STEMS = ("model", "pytorch_model")  # of the weight files
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_PREFIX = "text_model."  # before the names in files of a whole CLIP, and of transformers before 5.6


class CaptionError(UserError, ValueError):
    """A caption is longer than the text encoder reads."""


class TextEncoder:
    """A text model with its tokenizer, in float32 and eval mode, without gradients.

    Captions are encoded one by one, so that the tokens of one do not depend on the others, and the newest are kept.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._tokens = lru_cache(CACHED_CAPTIONS)(self._encoded)

    @property
    def name(self) -> str:
        """The kind of its network, as transformers names it: clip_text_model, bert ..."""
        return self.network.config.model_type

    @property
    def width(self) -> int:
        return self.network.config.hidden_size

    @property
    def token_count(self) -> int:
        """T, of every caption: short ones are padded."""
        return min(MAX_TOKENS, self.network.config.max_position_embeddings)

    def to(self, device: torch.device) -> "TextEncoder":
        self.network.to(device)
        self._tokens.cache_clear()
        return self

    def compute_in(self, dtype: torch.dtype) -> "TextEncoder":
        return self  # it costs little, and each caption is encoded once

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, T, width) float32. What follows the first T tokens of a caption is not read."""
        return torch.cat([self._tokens(caption) for caption in captions])

    def refuse_long(self, caption: str) -> None:
        """Raise CaptionError for a caption of more than T tokens, whose end would not be read."""
        length = len(self.tokenizer(caption)["input_ids"])
        if length > self.token_count:
            raise CaptionError(
                f"caption {one_line(caption, 40)!r}: {length} tokens, this model reads {self.token_count}; shorten it"
            )

    def _encoded(self, caption: str) -> Tensor:
        words = self.tokenizer(caption)["input_ids"]
        if len(words) > self.token_count:
            words = [*words[: self.token_count - 1], words[-1]]  # the last one ends a caption
        # not padded by the tokenizer, which keeps such settings and would save them
        padding = self.token_count - len(words)
        device = self.network.device
        ids = torch.tensor([[*words, *[self.tokenizer.pad_token_id] * padding]], device=device)
        mask = torch.tensor([[1] * len(words) + [0] * padding], device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if self.name == "clip_text_model":  # causal: the padding changes no word's state
                return self.network(input_ids=ids).last_hidden_state
            return self.network(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


def load_text_encoder(folder: Path) -> TextEncoder:
    """Load a whole CLIP (its text part), Stable Diffusion's folder, a text model or a sentence encoder. No code of the
    folder runs.

    Raises WeightsError.
    """
    weights = part_folder(folder, PARTS[0])
    words = folder / PARTS[1] if (folder / PARTS[1]).is_dir() else weights
    raw = read_json(weights / "config.json")
    if not any((words / name).is_file() for name in _VOCABULARIES):  # transformers would make one of three words
        raise WeightsError(f"{words}: no tokenizer in it ({', '.join(_VOCABULARIES)})")
    try:
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
        config = getattr(config, "text_config", config)
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise WeightsError(f"{weights}: not a text encoder with its tokenizer ({one_line(error, 200)})") from None
    has_sizes = all(isinstance(getattr(config, key, None), int) for key in ("hidden_size", "max_position_embeddings"))
    if not has_sizes or config.is_encoder_decoder or not tokenizer.is_fast or tokenizer.pad_token is None:
        raise WeightsError(
            f"{weights}: a {raw.get('model_type')} model; a text encoder is CLIP's text model, or a sentence encoder "
            "like BERT's"
        )
    if len(tokenizer) > config.vocab_size:
        raise WeightsError(f"{weights}: {config.vocab_size} words, its tokenizer has {len(tokenizer)}")
    tensors = {name.removeprefix(_PREFIX): value for name, value in read_folder(weights, *_STEMS).items()}
    with torch.device("meta"):
        wanted = list(AutoModel.from_config(config).state_dict())
    named = {name: tensors[flat] for name in wanted if (flat := name.removeprefix(_PREFIX)) in tensors}
    return TextEncoder(new_loaded(lambda: AutoModel.from_config(config), named, str(weights)), tokenizer)


def save_text_encoder(folder: Path, encoder: TextEncoder) -> None:
    """Write `text_encoder` and `tokenizer` below `folder`, in diffusers' layout."""
    weights, words = (folder / part for part in PARTS)
    weights.mkdir(parents=True, exist_ok=True)
    encoder.network.config.to_json_file(weights / "config.json")
    tensors = {name: value.float().cpu().contiguous().clone() for name, value in encoder.network.state_dict().items()}
    refuse_non_finite(tensors, f"{weights}: not written")
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    encoder.tokenizer.save_pretrained(words)


def text_encoder_digest(folder: Path) -> str:
    """16 hex digits of the sha256 over the weights and the vocabulary that `save_text_encoder` wrote."""
    digest = hashlib.sha256()
    for name in (f"{PARTS[0]}/model.safetensors", f"{PARTS[1]}/tokenizer.json"):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()[:16]
