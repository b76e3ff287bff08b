"""Words to a direction in CLIP's joint space of pictures and words."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from pbe.errors import one_line
from pbe.model.backbone import Backbone
from pbe.model.clip import ClipBackbone
from pbe.model.folder import STEMS
from pbe.model.tensors import WeightsError, new_loaded, read_folder, read_json
from pbe.retrieve.embed import FindError

VISUAL, TEXT = "visual_projection.weight", ("text_model.", "text_projection.")


def text_query(backbone: Backbone, folder: Path, words: str) -> tuple[np.ndarray, np.ndarray]:
    """The words as a (J,) float32 unit vector, and the (J, width) projection of class tokens to the same space.

    folder: the CLIP folder that `backbone` was read from. Raises FindError if it has no text tower, or no projection.
    """
    if not isinstance(backbone, ClipBackbone):
        raise FindError(f"--text: {backbone.name} knows no words; make the index with --model and a CLIP folder")
    if not (folder / "config.json").is_file():
        raise FindError(f"--text: {folder} has no text tower; make the index with --model and a whole CLIP folder")
    tensors, raw = read_folder(folder, *STEMS), read_json(folder / "config.json")
    tower = {name: value for name, value in tensors.items() if name.startswith(TEXT) and "position_ids" not in name}
    if VISUAL not in tensors or not tower or not raw.get("text_config"):
        raise FindError(f"--text: {folder} lacks the text tower or {VISUAL}; index with the whole CLIP model")
    sizes = raw["text_config"] | {"projection_dim": raw.get("projection_dim", len(tensors[VISUAL]))}
    try:
        config = CLIPTextConfig(**sizes)
        network = new_loaded(lambda: CLIPTextModelWithProjection(config), tower, str(folder)).float().eval()
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
            [words], truncation=True, max_length=config.max_position_embeddings, return_tensors="pt"
        )
        with torch.no_grad():
            found = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds[0].numpy()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise FindError(f"--text: {folder}: its text part cannot be read ({one_line(error, 200)})") from None
    length = float(np.linalg.norm(found))
    if not np.isfinite(length) or length == 0:
        raise FindError(f"--text: {folder}: its text tower gives NaN; its weights are damaged")
    return found / length, tensors[VISUAL].float().numpy()
