"""The model that a command takes where --model is left out."""

import sys

from pbe.places import repo_root

TRAINED = "models/full"  # what `make repro` leaves
KEPT = "models/pretrained/small"  # what the repository brings


def default_model() -> str:
    """The trained model of this clone if there is one, otherwise the repository's own; says which on stderr.

    Raises ValueError if neither is there, as where pbe was installed without its repository.
    """
    for name in (TRAINED, KEPT):
        if (repo_root() / name / "pbe.json").is_file():
            print(f"model: {name}", file=sys.stderr)
            return str(repo_root() / name)
    raise ValueError(f"neither {TRAINED} nor {KEPT} in {repo_root()}: name a model by --model")
