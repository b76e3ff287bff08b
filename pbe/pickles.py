"""Reads a pickle as data, without executing it.

A pickle is a program that calls what it names. This reader calls nothing: a class or function is its name, an object is
a record of how it would be made. So no pickle runs code, writes a file or changes a class here, and memory is bounded
by the length of the pickle: arguments are taken from its bytes, and memo indices, which may be any number, are keys.
"""

import pickletools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from typing import IO, Any, cast

from pbe.errors import one_line

# The largest known checkpoint, with its optimizer, has 0.2 million. An operation makes an object of some 100 bytes.
MAX_OPERATIONS = 4_000_000

_KEYS = (str, bytes, int, float, bool, type(None))
_CONSTANTS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
))  # fmt: skip


class PickleError(ValueError):
    """The bytes are not a whole pickle, or use what no weights and no mixture need; the message says what."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Made:
    """An object that a pickle would make: by calling `maker` with `args`, then setting state, keys and elements.

    `args` is a tuple in every pickle that was written, but a damaged one may have anything here.
    """

    maker: Any
    args: Any = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Stored:
    """An object outside the pickle, by the id that its writer gave it; torch puts tensors' values there."""

    pid: Any


@dataclass(frozen=True)
class Pickle:
    """What one pickle holds. names: all classes and functions that it names. stored: all references outside it.

    value: plain values, lists, tuples, dicts, and objects as `Made`. Keys are strings, bytes, numbers or None; entries
    with other keys are left out, because hashing a nested key may take for ever. Sets are lists.
    """

    value: Any
    names: frozenset[Name]
    stored: tuple[Stored, ...]


def read_pickle(stream: IO[bytes] | mmap) -> Pickle:
    """Read one pickle from the stream's position, up to and including its end. Raises PickleError."""
    machine = _Machine()
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # a damaged one has odd escapes
            for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], stream))):
                if count >= MAX_OPERATIONS:
                    raise PickleError(f"more than {MAX_OPERATIONS:,} operations")
                machine.step(opcode.name, argument)
        return Pickle(machine.pop(), frozenset(machine.names), tuple(machine.stored))
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise PickleError(f"not a whole pickle ({one_line(error, 150) or type(error).__name__})") from None


def mapping_of(value: Any) -> Mapping[Any, Any]:
    """The entries of a dict, or of an OrderedDict or another subclass of dict; empty for any other value."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Made):
        return {}
    if value.items or value.maker != Name("collections", "OrderedDict"):
        return value.items
    pairs = value.args[0] if isinstance(value.args, tuple) and value.args else ()  # as Python 2 wrote it
    return _dict(item for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 for item in pair)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.names: set[Name] = set()
        self.stored: list[Stored] = []

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError("takes more than is there")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def step(self, operation: str, argument: Any) -> None:
        push = self.stack.append
        if operation in _CONSTANTS:
            push(argument)
            return
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(operation == "NEWTRUE")
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                if self.marks and len(self.stack) == self.marks[-1]:
                    self.marks.pop()
                else:
                    self.pop()
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                push(self.stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST" | "EMPTY_SET":
                push([])
            case "EMPTY_DICT":
                push({})
            case "TUPLE":
                push(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                last = [self.pop() for _ in range(int(operation[-1]))]
                push(tuple(reversed(last)))
            case "LIST" | "FROZENSET":
                push(self.since_mark())
            case "DICT":
                push(_dict(self.since_mark()))
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self.since_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self.since_mark())
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                push(self._named(module, name))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                push(self._named(module, name))
            case "INST":
                module, _, name = argument.partition(" ")
                push(Made(self._named(module, name), tuple(self.since_mark())))
            case "OBJ":
                maker, *args = self.since_mark()
                push(Made(maker, tuple(args)))
            case "REDUCE" | "NEWOBJ":
                args, maker = self.pop(), self.pop()
                push(Made(maker, args))
            case "NEWOBJ_EX":
                _, args, maker = self.pop(), self.pop(), self.pop()
                push(Made(maker, args))
            case "BUILD":
                state = self.pop()
                if isinstance(self.stack[-1], Made):
                    self.stack[-1].state = state
            case "PERSID" | "BINPERSID":
                self.stored.append(Stored(argument if operation == "PERSID" else self.pop()))
                push(self.stored[-1])
            case _:  # registered extensions and buffers outside the pickle
                raise PickleError(f"it uses {operation}, which no weights need")

    def _named(self, module: Any, name: Any) -> Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("it names a class by something that is no text")
        found = Name(module, name)
        self.names.add(found)
        return found

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.elements += values
        elif isinstance(target, list):
            target += values
        else:
            raise PickleError(f"it appends to a {type(target).__name__}")

    def _update(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Made):
            raise PickleError(f"it sets a key of a {type(target).__name__}")
        (target.items if isinstance(target, Made) else target).update(_dict(flat))


def _dict(flat: Any) -> dict[Any, Any]:
    """A dict of keys and values in turn."""
    turns = iter(flat)
    return {key: value for key, value in zip(turns, turns, strict=True) if isinstance(key, _KEYS)}
