"""The network of a training: as it begins, and with what was trained.

Raises WeightsError or AdapterError if stored weights do not fit, StoreError if they cannot be read.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pbe.data.schema import array_value
from pbe.data.slots import slot_files
from pbe.model.adapter import load_adapter
from pbe.model.exemplar import ExemplarMapper
from pbe.model.initial import load_stored
from pbe.model.text import TextEncoder
from pbe.model.unet import ConditionedUNet, new_network
from pbe.model.weight_store import stored_folder
from pbe.store import Manifest, Store
from pbe.train.spec import TrainSpec
from pbe.train.trainable import choose_trainable

STATISTICS_ROWS = 2048  # references whose statistics standardise the exemplar features


def initial_network(spec: TrainSpec, store: Store, text: TextEncoder | None) -> ConditionedUNet:
    """Random weights of the run's seed, or those of `spec.initial`; equal on every rank. text: for captions."""
    torch.manual_seed(spec.seed)
    network = new_network(spec.arch)
    if isinstance(network.exemplar, ExemplarMapper):
        if network.exemplar.projection is not None:
            network.exemplar.set_statistics(_reference_features(store, spec.encoded))
    elif text is not None:
        network.exemplar.set_empty(text([""]))
    if spec.initial is not None:
        load_stored(network, store, spec.initial)
    return network


def freeze(network: ConditionedUNet, spec: TrainSpec, store: Store) -> None:
    """Freeze what `train.trainable` does not name; add LoRA's updates, those of `spec.adapter` if there is one."""
    choose_trainable(network, spec.cfg.trainable, seed=spec.seed)
    if spec.adapter is not None:
        with stored_folder(store, spec.adapter) as folder:
            load_adapter(network, folder)


def network_with(spec: TrainSpec, store: Store, tensors: Mapping[str, Tensor]) -> ConditionedUNet:
    """A network with these trained parameters and buffers, and what was frozen from its source."""
    network = new_network(spec.arch)
    if spec.cfg.trainable != "all":
        assert spec.initial is not None
        load_stored(network, store, spec.initial)
        choose_trainable(network, spec.cfg.trainable, seed=spec.seed)
    frozen = {name: value for name, value in network.named_parameters() if not value.requires_grad}
    network.load_state_dict(frozen | dict(tensors))
    return network


def _reference_features(store: Store, encoded: Manifest) -> Tensor:
    """(N, width) clean class tokens of the first rows in manifest order, the same on every rank."""
    rows: list[np.ndarray] = []
    for files in slot_files(encoded):
        for file in files:
            table = store.read_table(file, columns=["exemplar_tokens"])
            field = table.schema.field("exemplar_tokens")
            # copies, because a view would keep all tokens of its row
            rows += [array_value(field, value.as_py())[0, 0].copy() for value in table.column(0)]
        if len(rows) >= STATISTICS_ROWS:
            break
    return torch.from_numpy(np.stack(rows[:STATISTICS_ROWS]))
