"""Base classes and number types of all settings.

The settings of each stage are beside its code: in `pbe/data/filter.py`, and in `settings.py` of `pbe/data`,
`pbe/model`, `pbe/train` and `pbe/evaluate`. `pbe/config.py` reads params.yaml into them.
A field without a default must be in params.yaml, with its unit and source as a comment. A field that few people set has
its default, unit and source in the code; `python -m pipelines params` shows both kinds.
"""

from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _reject_bool(value: Any) -> Any:
    """Reject YAML's `yes` and `true`, which pydantic would read as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


Int = Annotated[int, BeforeValidator(_reject_bool)]
Float = Annotated[float, BeforeValidator(_reject_bool)]
PositiveInt = Annotated[Int, Field(ge=1)]
Frac = Annotated[Float, Field(ge=0, le=1)]
Prob = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Dtype = Literal["float16", "float32"]  # of stored arrays


class OnDisk:
    """Marks a setting that names a file or folder, which is read through places.local_path."""


LocalPath = Annotated[str, Field(min_length=1), OnDisk()]
LocalOrS3 = Annotated[str, Field(min_length=1), OnDisk()]  # read as data/files.file_tree
Weights = Annotated[str, Field(min_length=1), OnDisk()]  # or org/name@revision on the hub: model/hub.weights_folder


class Settings(BaseModel):
    """Frozen; rejects unknown keys, infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def identity(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the settings that name a part: those that differ from their defaults, except the keys in `without`.

        Adding a setting thus renames no part. A changed default needs a new VERSION of its stage, as a test says
        (tests/pipelines/test_versions.py).
        """
        return self.model_dump(mode="json", exclude=set(without), exclude_defaults=True)


class TaskResources(Settings):
    """Resources reserved for one task. Ray schedules by it but does not enforce it as a limit."""

    cpus: Float = Field(gt=0)
    memory_gib: Float = Field(ge=0)  # 0: none reserved


class ActorResources(TaskResources):
    """Resources reserved for one actor or training worker; without a GPU it computes on the CPU."""

    gpus: Float = Field(ge=0)

    @model_validator(mode="after")
    def _whole_or_a_share(self) -> "ActorResources":
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus: {self.gpus} must be a share of one GPU, or a whole number")
        return self


def paths_in(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting of the model, and of the models in it, that is marked as OnDisk: its dotted key and value."""
    for name, field in type(settings).model_fields.items():
        value, key = getattr(settings, name), prefix + name
        if isinstance(value, str) and names_path(field.annotation, *field.metadata):
            yield key, value
        elif isinstance(value, BaseModel):
            yield from paths_in(value, f"{key}.")
        elif isinstance(value, dict | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for inner, item in items:
                if isinstance(item, BaseModel):
                    yield from paths_in(item, f"{key}.{inner}.")


def names_path(*annotations: Any) -> bool:
    """Return whether a field's annotation, or a part of it, is marked as OnDisk."""
    return any(isinstance(item, OnDisk) or names_path(*get_args(item)) for item in annotations)


def refuse_duplicates(key: str, values: tuple[Any, ...]) -> None:
    """Raises ValueError if `values` contains duplicates; for validators."""
    if len(set(values)) < len(values):
        raise ValueError(f"{key}: {list(values)} contains duplicates")
