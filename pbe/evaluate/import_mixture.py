"""Convert a pickled scikit-learn GaussianMixture to arrays without executing code from the file (pbe/pickles.py)."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from pbe.evaluate.metrics.mixture import Mixture, MixtureError, save_mixture
from pbe.model.file_kind import HEAD_BYTES, other_kind
from pbe.pickles import Made, Name, PickleError, mapping_of, read_pickle

_NUMBERS = ("f2", "f4", "f8")
_NDARRAY, _DTYPE = Name("numpy", "ndarray"), Name("numpy", "dtype")
# Python's own names: before protocol 2 an object is made by _reconstructor, and before 3 bytes by encode
_RECONSTRUCTOR = (Name("copy_reg", "_reconstructor"), Name("copyreg", "_reconstructor"))
_ENCODE = Name("_codecs", "encode")
_PYTHON = (*_RECONSTRUCTOR, _ENCODE, Name("__builtin__", "object"), Name("builtins", "object"))


def import_mixture(source: Path, out: Path) -> Mixture:
    """Read the pickle and write the .npz. Raises MixtureError."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise MixtureError(f"{source}: cannot be read ({error.strerror})") from None
    mixture = mixture_from_pickle(data, str(source))
    save_mixture(out, mixture, source_sha256=hashlib.sha256(data).hexdigest())
    return mixture


def mixture_from_pickle(data: bytes, where: str) -> Mixture:
    """Extract the mixture from the bytes of a pickle. Raises MixtureError naming `where`."""
    try:
        read = read_pickle(io.BytesIO(data))
        _refuse_foreign(read.names)
        state = mapping_of(_state_of(read.value))
        if "precisions_cholesky_" not in state:
            raise MixtureError("its mixture was never fitted: it has no precisions_cholesky_")
        weights, means, roots = (_array(state, name) for name in ("weights_", "means_", "precisions_cholesky_"))
        return Mixture(weights, means, roots, state["covariance_type"])
    except MixtureError as error:
        raise MixtureError(f"{where}: {error}") from None
    except PickleError as error:
        what = other_kind(data[:HEAD_BYTES]) or error
        raise MixtureError(f"{where}: not a complete pickle of a mixture ({what})") from None
    except KeyError as error:
        raise MixtureError(f"{where}: damaged: its mixture has no {error.args[0]}") from None


def _refuse_foreign(names: frozenset[Name]) -> None:
    """Raise MixtureError for a name that no mixture needs: the file is something else, or means harm."""
    for name in sorted(names, key=lambda name: (name.module, name.name)):
        if not (
            name in _PYTHON
            or name in (_NDARRAY, _DTYPE)
            or name.module.startswith(("numpy.core.", "numpy._core.", "numpy.random."))
            or _is_mixture(name)
        ):
            raise MixtureError(
                f"it imports {name.module}.{name.name}, which a mixture does not need; no code from the file was run. "
                "If joblib wrote it, save it again with pickle.dump"
            )


def _is_mixture(name: Any) -> bool:
    return isinstance(name, Name) and name.module.startswith("sklearn.mixture") and name.name == "GaussianMixture"


def _state_of(value: Any) -> Any:
    maker = value.maker if isinstance(value, Made) else None
    if maker in _RECONSTRUCTOR and isinstance(value.args, tuple) and value.args:
        maker = value.args[0]
    if not _is_mixture(maker):
        raise MixtureError(f"it holds a {type(value).__name__}, not scikit-learn's GaussianMixture")
    return value.state


def _array(state: Any, name: str) -> np.ndarray:
    """The array of floating-point numbers of this name, as float64."""
    value = state[name]
    match value:
        case Made(Name(_, "_reconstruct"), (Name("numpy", "ndarray"), *_), (_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case Made(Name(_, "_frombuffer"), (data, dtype, shape, order)):  # protocol 5
            pass
        case _:
            raise MixtureError(f"its {name} is not a numpy array of numbers")
    try:
        flat = np.frombuffer(_bytes(data), _dtype(dtype))
        return flat.reshape(shape, order="F" if order == "F" else "C").astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise MixtureError(f"damaged: its {name} cannot be read ({error})") from None


def _bytes(data: Any) -> bytes:
    match data:
        case Made(Name("_codecs", "encode"), (str(text), "latin1")) | str(text):
            return text.encode("latin1")
        case bytes() | bytearray():
            return bytes(data)
    raise MixtureError("one of its arrays has no bytes")


def _dtype(value: Any) -> np.dtype:
    match value:
        case Made(Name("numpy", "dtype"), (str(code), *_), state) if code.lstrip("<>|=") in _NUMBERS:
            order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "<"
            return np.dtype(f"{order}{code.lstrip('<>|=')}")
    raise MixtureError("one of its arrays does not hold floating-point numbers")
