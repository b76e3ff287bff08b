"""The model that a command takes where --model is left out."""

import sys
from pathlib import Path

from pbe.places import repo_root

TRAINED = "models/full"  # `make repro` trains it
KEPT = "models/pretrained/small"  # comes with the repository


def default_model() -> str:
    """The trained model of this clone if there is one, otherwise the repository's own; says which on stderr.

    In the repository's folder the path is relative, so that recipes name no folder of this machine. Raises ValueError
    if neither is there, as where pbe was installed without its repository.
    """
    for name in (TRAINED, KEPT):
        folder = repo_root() / name
        if (folder / "pbe.json").is_file():
            print(f"model: {name}", file=sys.stderr)
            return name if Path(name).resolve() == folder.resolve() else str(folder)
    raise ValueError(f"no {TRAINED} and no {KEPT} in {repo_root()}: run `make repro`, or name a model with --model")
