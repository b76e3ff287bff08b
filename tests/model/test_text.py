"""Text encoders: their tokens are the library's, whatever the other captions are; damaged folders are one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from pbe.model.tensors import WeightsError
from pbe.model.text import CaptionError, TextEncoder, load_text_encoder, save_text_encoder, text_encoder_digest
from tests.tiny_weights import CAPTION_TOKENS, CONTEXT_WIDTH, tiny_text_encoder, write_clip

CAPTIONS = ["a photo of a red car", "", "a dog"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("weights") / "clip")


def test_the_tokens_are_those_of_stable_diffusion(clip: Path) -> None:
    """As its pipeline calls the two classes: padded with the end token, without an attention mask."""
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    network = CLIPTextModel(tiny_text_encoder().network.config).eval()
    network.load_state_dict(tiny_text_encoder().network.state_dict())
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = network(ids)[0]
    found = load_text_encoder(clip)(CAPTIONS)
    assert found.shape == (3, CAPTION_TOKENS, CONTEXT_WIDTH) and found.dtype == torch.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert float((found[0] - found[2]).abs().max()) > 0.1  # otherwise equal tokens would mean nothing


def test_a_captions_tokens_do_not_depend_on_the_others(clip: Path) -> None:
    together, encoder = load_text_encoder(clip)(CAPTIONS), load_text_encoder(clip)
    for caption, tokens in zip(reversed(CAPTIONS), reversed(together), strict=True):
        assert torch.equal(encoder([caption])[0], tokens)


def test_what_is_written_is_read_and_has_one_digest(clip: Path, tmp_path: Path) -> None:
    """The digest names the run: it must not depend on how often an encoder was copied, or on what it has read."""
    first = load_text_encoder(clip)
    save_text_encoder(tmp_path / "a", first)
    again = load_text_encoder(tmp_path / "a")
    assert torch.equal(again(CAPTIONS), first(CAPTIONS))
    save_text_encoder(tmp_path / "b", again)
    assert text_encoder_digest(tmp_path / "a") == text_encoder_digest(tmp_path / "b")
    again.network.get_input_embeddings().weight[0] += 1
    save_text_encoder(tmp_path / "c", again)
    assert text_encoder_digest(tmp_path / "c") != text_encoder_digest(tmp_path / "a")


def test_a_long_caption_is_refused_or_cut_before_its_end_token(clip: Path) -> None:
    encoder = load_text_encoder(clip)
    encoder.refuse_long("x" * (CAPTION_TOKENS - 2))
    with pytest.raises(CaptionError, match="41 tokens, this model reads 40; shorten it"):
        encoder.refuse_long("x" * (CAPTION_TOKENS - 1))
    cut = encoder(["x" * 100])
    assert torch.equal(cut, encoder(["x" * 200]))
    ended = [*encoder.tokenizer("x" * 100)["input_ids"][: CAPTION_TOKENS - 1], encoder.tokenizer.eos_token_id]
    with torch.no_grad():
        assert torch.equal(cut, encoder.network(torch.tensor([ended])).last_hidden_state)


def _sentence_encoder(folder: Path) -> Path:
    """A tiny random BERT, as sentence encoders are."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "car"])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=90, **sizes)).save_pretrained(folder)
    return folder


def test_a_sentence_encoders_padding_is_zero_and_changes_no_word(tmp_path: Path) -> None:
    encoder = load_text_encoder(_sentence_encoder(tmp_path))
    tokens = encoder(["red car"])
    assert (encoder.name, encoder.width, encoder.token_count) == ("bert", 16, 77)
    network = BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        alone = network(torch.tensor([[2, 4, 5, 3]])).last_hidden_state
    np.testing.assert_allclose(tokens[:, :4], alone, rtol=0, atol=1e-5)
    assert not tokens[:, 4:].any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("text_model.final_layer_norm.weight", "do not fit: missing 1 such as"),
        ("tokenizer.json", r"no tokenizer in it \(tokenizer.json, vocab.json, vocab.txt\)"),
        ("config.json", "no config.json in it"),
        ("vision alone", "not a text encoder|a clip_vision_model model"),
    ],
)
def test_a_folder_without_a_part_is_one_line(tmp_path: Path, damage: str, message: str) -> None:
    folder = write_clip(tmp_path / "clip")
    if damage.startswith("text_model"):
        tensors = load_file(folder / "model.safetensors")
        del tensors[damage]
        save_file(tensors, folder / "model.safetensors")
    elif damage == "vision alone":
        config = json.loads((folder / "config.json").read_text())["vision_config"]
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    else:
        (folder / damage).unlink()
    with pytest.raises(WeightsError, match=message) as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_words_must_be_those_of_the_network(tmp_path: Path) -> None:
    small = tiny_text_encoder()
    save_text_encoder(tmp_path, TextEncoder(small.network, small.tokenizer))
    config = json.loads((tmp_path / "text_encoder/config.json").read_text())
    (tmp_path / "text_encoder/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(WeightsError, match="100 words, its tokenizer has 514"):
        load_text_encoder(tmp_path)
