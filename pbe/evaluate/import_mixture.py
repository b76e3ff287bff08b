"""Convert a pickled scikit-learn GaussianMixture to arrays without executing code from the file.

A pickle is a program. This unpickler replaces the classes of scikit-learn and numpy that a plain mixture needs with
inert stand-ins, and rejects every other name before calling it.
"""

import hashlib
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from pbe.evaluate.metrics.mixture import Mixture, MixtureError, save_mixture

# what a damaged pickle may raise while it is parsed
_MALFORMED = (
    pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, MemoryError,
    ImportError, OverflowError, RecursionError, UnicodeDecodeError, AssertionError,
)  # fmt: skip


class _Inert:
    """Stand-in for an object that is not needed: accepts any state, does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Mixture(_Inert):
    """Stand-in for scikit-learn's GaussianMixture; its state is a dict."""


class _Dtype:
    """Stand-in for numpy.dtype, restricted to plain numbers; of its pickled state, only the byte order is used."""

    def __init__(self, code: object, *_: object) -> None:
        known = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
        if not isinstance(code, str) or code.lstrip("<>|=") not in known:
            raise MixtureError(f"it has an array of {code!r}; a mixture contains only plain numbers")
        self.code, self.order = code.lstrip("<>|="), "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = str(state[1])

    @property
    def real(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stand-in for numpy.ndarray: numpy parses array state in C, where a damaged one crashes the process."""

    def __init__(self) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise MixtureError("one of its arrays has an invalid state")
        _, shape, dtype, fortran, data = state
        self.array = _filled(data, dtype, shape, "F" if fortran else "C")


def _filled(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise MixtureError("one of its arrays has an invalid dtype")
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):  # bytes(n) would be n of them
        raise MixtureError("one of its arrays has no bytes")
    return np.frombuffer(data, dtype.real).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(cls: object, *_: object) -> _Array:
    if cls is not _Array:
        raise MixtureError("it builds an array that is not numeric")
    return _Array()


def _scalar(dtype: object, data: Any = b"") -> Any:
    return _filled(data, dtype, (), "C")[()]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: str, *_: object) -> _Array:
    made = _Array()
    made.array = _filled(data, dtype, shape, order)
    return made


_NUMPY = {
    ("multiarray", "_reconstruct"): _reconstruct,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _frombuffer,
}
_PLAIN = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package, _, last = module.rpartition(".")
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if package in ("numpy.core", "numpy._core") and (last, name) in _NUMPY:
            return _NUMPY[last, name]
        if module.startswith("sklearn.mixture") and name == "GaussianMixture":
            return _Mixture
        if module.startswith("numpy.random."):
            return _Inert  # the state of its random generator
        if (module, name) in (("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")):
            return _reconstructed
        if (module, name) in (("builtins", "object"), ("__builtin__", "object")):
            return object
        if (module, name) == ("_codecs", "encode"):
            return _encoded
        raise MixtureError(
            f"it imports {module}.{name}, which a mixture does not need; no code from the file was run. If joblib "
            "wrote it, save it again with pickle.dump"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise MixtureError("it refers to objects outside the file; a mixture does not")


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
        _check_memo(data)
        found = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(found, _Mixture):
            raise MixtureError(f"it holds a {type(found).__name__}, not scikit-learn's GaussianMixture")
        state = found.state
        if not isinstance(state, dict) or "precisions_cholesky_" not in state:
            raise MixtureError("its mixture was never fitted: it has no precisions_cholesky_")
        weights, means, roots = (_array(state[name]) for name in ("weights_", "means_", "precisions_cholesky_"))
        return Mixture(weights, means, roots, state["covariance_type"])
    except MixtureError as error:
        raise MixtureError(f"{where}: {error}") from None
    except _MALFORMED as error:
        raise MixtureError(
            f"{where}: not a complete pickle of a mixture ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:150]})"
        ) from None


def _check_memo(data: bytes) -> None:
    """Raise MixtureError for a memo index that no pickler writes: they count from 0, the oldest picklers from 1.

    The C unpickler allocates a table as long as the largest index: 18 GiB for a damaged file of 9 kB.
    """
    known = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if argument is not None and argument > known + 1:
                raise MixtureError("damaged: it has a memo index beyond its number of objects")
            known += 1


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, _Array) or value.array.dtype.kind != "f":
        raise MixtureError(f"one of its arrays is a {type(value).__name__}, not floating-point numbers")
    return value.array.astype(np.float64)


def _reconstructed(cls: Any, base: Any, state: Any) -> Any:
    """copyreg._reconstructor for the stand-ins alone: pickle protocols below 2 build objects with it."""
    if not (isinstance(cls, type) and issubclass(cls, _Inert)):
        raise MixtureError("it builds an object that is not part of a mixture")
    return cls()


def _encoded(text: str, encoding: str) -> bytes:
    """_codecs.encode for latin1 alone, which old protocols use to write bytes."""
    if encoding != "latin1":
        raise MixtureError(f"it uses the encoding {encoding}, expected latin1")
    return text.encode("latin1")
