"""A pickled scikit-learn GaussianMixture to arrays, executing nothing of the file.

A pickle is a program. Here it runs on an unpickler that knows what a plain mixture is made of (numpy arrays and their
parts), as inert stand-ins for scikit-learn's classes and numpy's, and refuses every other name before anything of it
is called.
"""

import hashlib
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from pbe.evaluate.metrics.mixture import Mixture, MixtureError, save_mixture

# what a damaged pickle may raise while it is taken apart
_ODD = (
    pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, MemoryError,
    ImportError, OverflowError, RecursionError, UnicodeDecodeError, AssertionError,
)  # fmt: skip


class _Inert:
    """Stands for an object that is not needed: takes any state, does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Mixture(_Inert):
    """Stands for scikit-learn's GaussianMixture; its state is a dict."""


class _Dtype:
    """numpy.dtype, of plain numbers alone. Of the state that a pickle gives it only the byte order is taken."""

    def __init__(self, code: object, *_: object) -> None:
        known = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
        if not isinstance(code, str) or code.lstrip("<>|=") not in known:
            raise MixtureError(f"it has an array of {code!r}; a mixture is made of plain numbers")
        self.code, self.order = code.lstrip("<>|="), "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = str(state[1])

    @property
    def real(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """numpy.ndarray. numpy itself reads the state of arrays and dtypes in C, where a damaged one ends the process."""

    def __init__(self) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise MixtureError("one of its arrays has no state of an array")
        _, shape, dtype, fortran, data = state
        self.array = _filled(data, dtype, shape, "F" if fortran else "C")


def _filled(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise MixtureError("one of its arrays has a type that is none")
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):  # bytes(n) would be n of them
        raise MixtureError("one of its arrays has no bytes")
    return np.frombuffer(data, dtype.real).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(cls: object, *_: object) -> _Array:
    if cls is not _Array:
        raise MixtureError("it makes an array of something else than numbers")
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
            f"it asks for {module}.{name}, which a mixture is not made of; nothing of the file was run. A mixture that "
            "joblib wrote is saved again with pickle.dump first"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise MixtureError("it refers to things outside the file, as no mixture does")


def import_mixture(source: Path, out: Path) -> Mixture:
    """Read the pickle, write the .npz. Raises MixtureError."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise MixtureError(f"{source}: cannot be read ({error.strerror})") from None
    mixture = mixture_from_pickle(data, str(source))
    save_mixture(out, mixture, source_sha256=hashlib.sha256(data).hexdigest())
    return mixture


def mixture_from_pickle(data: bytes, where: str) -> Mixture:
    """Raises MixtureError naming `where`."""
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
    except _ODD as error:
        raise MixtureError(
            f"{where}: not a whole pickle of a mixture ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
        ) from None


def _check_memo(data: bytes) -> None:
    """Raises MixtureError for a memo index that no pickler writes: they count from 0, the oldest from 1.

    The unpickler of C allocates a table as long as the largest index, 18 GiB for a file of 9 kB.
    """
    known = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if argument is not None and argument > known + 1:
                raise MixtureError("damaged: it numbers its objects beyond their count")
            known += 1


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, _Array) or value.array.dtype.kind != "f":
        raise MixtureError(f"one of its arrays is a {type(value).__name__} of no floating point numbers")
    return value.array.astype(np.float64)


def _reconstructed(cls: Any, base: Any, state: Any) -> Any:
    """copyreg._reconstructor, for the stand-ins alone: protocols below 2 make objects by it."""
    if not (isinstance(cls, type) and issubclass(cls, _Inert)):
        raise MixtureError("it makes an object in a way that no mixture does")
    return cls()


def _encoded(text: str, encoding: str) -> bytes:
    """_codecs.encode, for the one encoding by which old protocols write bytes."""
    if encoding != "latin1":
        raise MixtureError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")
