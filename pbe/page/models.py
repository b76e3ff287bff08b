"""The models that the page offers, and the one that is at work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pbe.edit import Editor, default_sampling, model_folder
from pbe.model.folder import guidance_scale_of
from pbe.model.weights import weights_sha256
from pbe.page.uploads import PageError


@dataclass(frozen=True)
class Loaded:
    """A model at work. label: what the page calls it; it names no folder of this machine."""

    label: str
    weights_sha256: str
    editor: Editor


class Models:
    """The models that the page offers; one is loaded at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: folders, or org/name@revision. Raises PageError for two of the same label."""
        self._names = {_label(name): name for name in names}
        if len(self._names) < len(names):
            raise PageError(f"--model {' '.join(names)}: two would have the same name in the page; rename one folder")
        self._loaded: Loaded | None = None

    @property
    def labels(self) -> list[str]:
        return list(self._names)

    def guidance_scale(self, label: str, scale_max: float) -> float:
        """At which a model's edits begin, from 1 to scale_max; one of the hub has upstream's.

        Raises PageError, ModelError, WeightsError.
        """
        scale = default_sampling(guidance_scale_of(Path(self._name(label)))).guidance_scale
        return min(max(scale, 1), scale_max)

    def load(self, label: str) -> Loaded:
        """Raises PageError for a label that is not offered, and the errors of Editor.load."""
        name = self._name(label)
        if self._loaded is None or self._loaded.label != label:
            self._loaded = None  # two large models may not fit
            folder = model_folder(name)
            self._loaded = Loaded(label, weights_sha256(folder), Editor.load(folder))
        return self._loaded

    def _name(self, label: str) -> str:
        if label not in self._names:
            raise PageError("This page does not offer that model.")
        return self._names[label]


def _label(name: str) -> str:
    """The last two folders; a hub name has as many."""
    return "/".join(Path(name).parts[-2:])
