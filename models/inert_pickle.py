"""Pickles read as data: nothing that they name is imported, called or changed.

`pickletools.genops` of the standard library splits the stream into operations. `load` builds plain containers, tensors,
and `Inert` objects instead of other classes. Memory and time are proportional to the length of the stream.
"""

import math
import pickletools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from torch import Tensor, nn

from palimpsest.common.messages import short_repr

MOST_OPERATIONS = 10_000_000  # a model of 10,000 tensors, with its average and optimizer, takes about 3 million
_MOST_SHELLS, _MOST_BITS = 10_000, 1024
_MOST_IN_A_KEY, _MOST_DIMENSIONS = 1000, 64
_LONGEST_NAME = 200


class Inert:
    """A stand-in for a pickled object of an unknown class: it accepts any construction and state, and does nothing."""

    state: object = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs

    def __setitem__(self, key: object, value: object) -> None:
        self.__dict__.setdefault("items", {})[key] = value

    def extend(self, values: list) -> None:
        """Keep the elements of a list of its class."""
        self.__dict__.setdefault("elements", []).extend(values)


def load(file: BinaryIO, size: int, storage: Callable[[object], Tensor]) -> object:
    """Return the object of the pickle at the position of `file`, and leave the file behind it.

    Args:
        size: bytes of the file.
        storage: returns the flat tensor of a persistent id.

    Raises:
        UnpicklingError: it asks for a class or function other than tensors, plain containers and `_FOREIGN` modules, or
            for more memory than the file has bytes.
        ValueError, TypeError, IndexError, KeyError, RuntimeError: it is corrupt.
    """
    machine = _Machine(storage, size)
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number == MOST_OPERATIONS:
            raise UnpicklingError(f"its pickle has more than {MOST_OPERATIONS:,} operations: refused")
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """The stack, the marks in it and the memo of a pickle that is being read. `left` counts elements and characters
    that may still be copied; each has taken a byte of the file before."""

    def __init__(self, storage: Callable[[object], Tensor], size: int) -> None:
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # the stacks below the marks
        self.memo: dict[int, object] = {}
        self.storage, self.left = storage, size
        self.shells = dict[tuple[str, str], type]()

    def step(self, name: str, argument: object) -> None:
        """Execute one operation."""
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                raise UnpicklingError(f"it holds a whole number of {argument.bit_length():,} bits: refused")
            self.push(argument)
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name not in _IGNORED:
            raise UnpicklingError(f"its pickle has the operation {name}, which torch.save does not write: refused")

    def push(self, thing: object) -> None:
        """Push onto the stack."""
        self.stack.append(thing)

    def marked(self) -> list[object]:
        """Pop all values above the last mark."""
        above, self.stack = self.stack, self.below.pop()
        return above

    def spend(self, container: object) -> None:
        """Count the elements of `container` as copied."""
        self.left -= len(container)
        if self.left < 0:
            raise UnpicklingError("its pickle copies more than it holds: refused")

    # ------------------------------------------------------------------------------ operations

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop(self, _: object) -> None:
        self.stack.pop() if self.stack else self.marked()

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def tuple_of(self, count: int) -> None:
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | Inert):
            raise UnpicklingError(f"it appends to a {type(target).__name__}")
        target.extend(values)

    def add(self, _: object) -> None:
        values, target = self.marked(), self.stack[-1]
        if type(target) is not set:
            raise UnpicklingError(f"it adds to a {type(target).__name__}")
        target.update(map(_key, values))

    def set_items(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Inert):
            raise UnpicklingError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_key(key)] = value

    def named(self, module: str, name: str) -> None:
        """Push the object of that name; a subclass of `Inert` for an unknown class."""
        if module == "__builtin__":
            module, name = "builtins", _PYTHON_2.get(name, name)
        if (module, name) in _NAMES:
            self.push(_NAMES[module, name])
            return
        if module.split(".")[0] not in _FOREIGN and module not in _FOREIGN and (module, name) != ("builtins", "range"):
            what = short_repr(f"{module}.{name}")[1:-1]
            raise UnpicklingError(f"the file asks to run {what}, which no checkpoint needs: refused")
        if not name.isidentifier() or len(name) > _LONGEST_NAME or len(module) > _LONGEST_NAME:
            raise UnpicklingError("it names a class by an invalid name: refused")
        if (module, name) not in self.shells:
            if len(self.shells) == _MOST_SHELLS:
                raise UnpicklingError(f"it names more than {_MOST_SHELLS:,} classes: refused")
            self.shells[module, name] = type(name, (Inert,), {"__module__": module})
        self.push(self.shells[module, name])

    def stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnpicklingError("it uses a name that is not a text")
        self.named(module, name)

    def call(self, arguments: object, keywords: object = None) -> None:
        thing = self.stack.pop()
        if type(arguments) is not tuple:
            raise UnpicklingError("its arguments are not a tuple")
        if isinstance(thing, type) and issubclass(thing, Inert):
            self.push(thing(*arguments, **(keywords or {})))
        elif callable(thing) and thing in _CALLS and not keywords:
            self.push(_CALLS[thing](self, *arguments))
        else:
            raise UnpicklingError(f"it calls a {type(thing).__name__}, which no checkpoint needs: refused")

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            if "_metadata" in state:  # of a module's state_dict
                target._metadata = state["_metadata"]
        else:
            raise UnpicklingError(f"it changes a {type(target).__name__}: refused")


def _key(key: object) -> object:
    """Return `key` if its type excludes chosen hash collisions, which would take quadratic time: texts, whose hashes
    differ between processes, tuples of them, whole numbers below 2^60, and `Inert` objects."""
    if type(key) is tuple and len(key) <= _MOST_IN_A_KEY:
        allowed = all(part is None or isinstance(part, str | bytes) for part in key)
    else:
        known = isinstance(key, str | bytes | bool | Inert | type | torch.dtype | None)
        allowed = known or (type(key) is int and key.bit_length() <= 60)
    if allowed:
        return key
    raise UnpicklingError(f"it has a key of the type {type(key).__name__}, or too large a key: refused")


# -------------------------------------------------------------------------------- allowed calls


def _tensor(
    machine: _Machine,
    storage: Tensor,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    *unused: object,
) -> Tensor:
    """Return a view of `storage` that lies within it. torch's own function would enlarge the storage instead."""
    if not all(isinstance(one, tuple) and len(one) <= _MOST_DIMENSIONS for one in (size, stride)):
        raise UnpicklingError("the size of a tensor is none")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise UnpicklingError("the size of a tensor is none")
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if type(storage) is not Tensor or count > len(storage) or last >= max(1, len(storage)):
        raise UnpicklingError(f"a tensor of the shape {size} is larger than its record in the file: refused")
    return storage.as_strided(size, stride, offset if count else 0).requires_grad_(requires_grad is True)


def _parameter(machine: _Machine, data: Tensor, requires_grad: bool, *unused: object) -> nn.Parameter:
    return nn.Parameter(data, requires_grad is True)


def _size(machine: _Machine, numbers: tuple) -> torch.Size:
    if not isinstance(numbers, list | tuple):
        raise UnpicklingError("the size of a tensor is none")
    machine.spend(numbers)
    return torch.Size(numbers)


def _device(machine: _Machine, kind: str, index: int | None = None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


def _set(kind: type) -> Callable:
    def build(machine: _Machine, elements: list | tuple = ()) -> set | frozenset:
        if not isinstance(elements, list | tuple):
            raise UnpicklingError(f"it makes a {kind.__name__} of a {type(elements).__name__}")
        machine.spend(elements)
        return kind(map(_key, elements))

    return build


def _ordered_dict(machine: _Machine, pairs: list | tuple = ()) -> OrderedDict:
    if not isinstance(pairs, list | tuple):
        raise UnpicklingError(f"it makes a dictionary of a {type(pairs).__name__}")
    machine.spend(pairs)
    return OrderedDict((_key(key), value) for key, value in pairs)


def _counter(machine: _Machine, counts: dict | None = None) -> Counter:
    if not isinstance(counts, dict | None):
        raise UnpicklingError(f"it makes a Counter of a {type(counts).__name__}")
    machine.spend(counts or {})
    return Counter(counts or {})


def _default_dict(machine: _Machine, factory: object = None) -> defaultdict:
    return defaultdict(factory if factory in (int, float, str, list, dict, set) else None)


def _encode(machine: _Machine, text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):  # with others it could grow
        raise UnpicklingError("it encodes otherwise than by latin-1: refused")
    machine.spend(text)
    return text.encode("latin1")


def _bytes(kind: type) -> Callable:
    def build(machine: _Machine, content: bytes | str = b"", encoding: str | None = None) -> bytes | bytearray:
        content = _encode(machine, content, encoding) if isinstance(content, str) else content
        if not isinstance(content, bytes):  # a number would be a length
            raise UnpicklingError(f"it makes {kind.__name__} of a {type(content).__name__}: refused")
        machine.spend(content)
        return kind(content)

    return build


def _of_numbers(kind: type) -> Callable:
    def build(machine: _Machine, *numbers: float | None) -> object:
        if not all(number is None or isinstance(number, int | float) for number in numbers):
            raise UnpicklingError(f"it makes a {kind.__name__} of values that are not numbers")
        return kind(*numbers)

    return build


_CALLS: dict[object, Callable] = {
    _tensor: _tensor, _parameter: _parameter, torch.Size: _size, torch.device: _device, set: _set(set),
    frozenset: _set(frozenset), OrderedDict: _ordered_dict, Counter: _counter, defaultdict: _default_dict,
    _encode: _encode, bytes: _bytes(bytes), bytearray: _bytes(bytearray), complex: _of_numbers(complex),
    slice: _of_numbers(slice),
}  # fmt: skip
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
            "ComplexDoubleStorage": torch.complex128}  # fmt: skip
_NAMES: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("_codecs", "encode"): _encode,
    **{("collections", kind.__name__): kind for kind in (OrderedDict, Counter, defaultdict)},
    **{("builtins", kind.__name__): kind for kind in (dict, list, set, tuple, int, float, str, bytes, bool, complex,
                                                      slice, frozenset, bytearray)},
    # A storage's class says the type of its numbers.
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}  # fmt: skip
_PYTHON_2 = {"long": "int", "unicode": "str", "xrange": "range"}  # names in pickles of protocol 2
# Modules of which a checkpoint may contain instances; those become `Inert`, and the modules are never imported.
_FOREIGN = ("omegaconf", "tokenizers", "transformers", "typing", "lightning", "pytorch_lightning", "torchmetrics",
            "functools", "pathlib", "enum", "torch.optim", "transformers_modules")  # fmt: skip

_IGNORED = {"PROTO", "FRAME", "STOP"}
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
             "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
             "BYTEARRAY8"}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip


def _dict(pairs: list[object]) -> dict[object, object]:
    return {_key(key): value for key, value in zip(pairs[::2], pairs[1::2], strict=True)}


_OPERATIONS: dict[str, Callable[[_Machine, object], object]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "PUT": _Machine.put, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GET": _Machine.get, "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "TUPLE": lambda m, _: m.push(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "LIST": lambda m, _: m.push(m.marked()),
    "DICT": lambda m, _: m.push(_dict(m.marked())),
    "FROZENSET": lambda m, _: m.push(frozenset(map(_key, m.marked()))),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.marked()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.marked()),
    "ADDITEMS": _Machine.add,
    "GLOBAL": lambda m, names: m.named(*names.split(" ", 1)),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda m, _: m.call(m.stack.pop()),
    "NEWOBJ": lambda m, _: m.call(m.stack.pop()),
    "NEWOBJ_EX": lambda m, _: m.call(keywords=m.stack.pop(), arguments=m.stack.pop()),
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.push(m.storage(m.stack.pop())),
}  # fmt: skip
