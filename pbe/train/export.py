"""The end of a training: the model's folder in the storage, its loss curve, and the record that it is finished."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pbe.model.adapter import Adapter, Base, merge_lora, save_adapter
from pbe.model.backbone import Backbone
from pbe.model.card import ModelCard
from pbe.model.codec import Codec
from pbe.model.text import TextEncoder
from pbe.model.weight_store import open_backbone, open_codec, open_text_encoder, stored_codec_sha256
from pbe.model.weights import ADAPTER_FOLDER, Model, save_model
from pbe.store import Store
from pbe.train.checkpoints import RAW, Run
from pbe.train.network import freeze, initial_network, network_with
from pbe.train.settings import LoraTrainable, TrainConfig
from pbe.train.spec import TrainSpec

CPU = torch.device("cpu")


def export_trained(
    spec: TrainSpec,
    store: Store,
    trained: Mapping[str, Mapping[str, Tensor]],
    codec: Codec,
    text: TextEncoder | None,
    *,
    history: Sequence[Mapping[str, float]],
) -> None:
    """Export what was trained, and record the run as finished.

    trained: parameters and buffers on the CPU, by the folder of their model inside the export: "" or RAW. history: the
    points of the loss curve.
    """
    encoder = _encoder(spec, store, text)
    with tempfile.TemporaryDirectory(prefix="pbe-export-") as local:
        for inner, tensors in trained.items():
            card = _card(spec.card, spec.cfg, raw=inner == RAW)
            model = Model(network_with(spec, store, tensors), codec.to(CPU), encoder, card)
            _save(Path(local) / inner, spec, store, model)
        _finish(spec, store, Path(local), history)


def export_initial(spec: TrainSpec) -> None:
    """Export the model that a training would begin with, which zero steps leave as it is: no ranks, no DeepSpeed.

    Raises WeightsError, AdapterError, StoreError.
    """
    store = Store(spec.store_uri)
    codec = open_codec(store, spec.encoded.config["codec"])
    text = open_text_encoder(store, spec.text) if spec.text is not None else None
    network = initial_network(spec, store, text)
    freeze(network, spec, store)
    with tempfile.TemporaryDirectory(prefix="pbe-export-") as local:
        _save(Path(local), spec, store, Model(network, codec, _encoder(spec, store, text), spec.card))
        _finish(spec, store, Path(local), [])


def _encoder(spec: TrainSpec, store: Store, text: TextEncoder | None) -> Backbone | TextEncoder:
    return open_backbone(store, spec.encoded.config["backbone"]) if text is None else text.to(CPU)


def _save(folder: Path, spec: TrainSpec, store: Store, model: Model) -> None:
    """Write the folder of a model, and for LoRA that of the adapter inside it, which is then merged."""
    if isinstance(spec.cfg.trainable, LoraTrainable):
        adapter = _adapter(spec, store, spec.cfg.trainable, model.card)
        save_adapter(folder / ADAPTER_FOLDER, model.network, adapter)
        merge_lora(model.network.unet)
    save_model(folder, model)


def _finish(spec: TrainSpec, store: Store, local: Path, history: Sequence[Mapping[str, float]]) -> None:
    run = Run(store, spec.run_name)
    store.copy_tree_in(local, f"{run.folder}/export")
    run.write_json("history.json", {"history": list(history)})
    loss = history[-1]["loss"] if history else None
    run.write_json("finished.json", {"steps": spec.cfg.steps, "loss": loss})


def _adapter(spec: TrainSpec, store: Store, trainable: LoraTrainable, card: ModelCard) -> Adapter:
    assert spec.initial is not None
    unet, image_encoder = spec.initial
    assert image_encoder is not None
    base = Base(spec.base_name, unet, image_encoder, stored_codec_sha256(store, spec.encoded.config["codec"]))
    return Adapter(base, trainable.lora, card)


def _card(card: ModelCard, cfg: TrainConfig, *, raw: bool) -> ModelCard:
    """The card; if there are two models, an average and that of the last step, with what this one is."""
    if cfg.ema_decay is None:
        return card
    said = "of the last step" if raw else f"averaged over steps (EMA, decay {cfg.ema_decay})"
    return replace(card, run=card.run | {"weights": said})
