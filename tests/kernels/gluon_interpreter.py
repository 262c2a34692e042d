"""Run Gluon kernels on the CPU, on tensors: Triton's own interpreter is for the language above it alone.

A kernel's functions are run as the Python that they are, with the language's names bound to what is here. Programs run
one after the other, those that wait for each other at a time, their warp-specialised partitions as threads that meet at
real barriers. Found that way: wrong
indices, shapes and dtypes, accesses outside of a tensor, reads of what was never written, products read before they
were waited for, tiles that a product reads before all threads have written them or that are written before all threads
have waited for the product, barriers that nobody completes. Not found: layouts that do not fit (compiling finds those),
and other races, for a copy is there at once.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from inline_ptx import run_elementwise
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper

_TO_TORCH = {
    gl.int1: torch.bool,
    gl.int8: torch.int8,
    gl.int16: torch.int16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.float8e4nv: torch.float8_e4m3fn,
    gl.bfloat16: torch.bfloat16,
    gl.float16: torch.float16,
    gl.float32: torch.float32,
}
_FROM_TORCH = {ours: theirs for theirs, ours in _TO_TORCH.items()}
_SECONDS = 60  # for a barrier; who waits longer waits for ever


class InterpreterError(AssertionError):
    """A kernel did what no GPU would take."""


class Value:
    """A tile or a scalar in registers."""

    def __init__(self, data: Any, layout: Any = None) -> None:
        self.data = data if isinstance(data, Tensor) else torch.tensor(data)
        if self.data.dtype == torch.int64 and not isinstance(data, Tensor):
            self.data = self.data.to(torch.int32)
        self.type = types.SimpleNamespace(layout=layout)

    @property
    def dtype(self) -> Any:
        return _FROM_TORCH[self.data.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        convert = self.data.view if bitcast else self.data.to
        return Value(convert(_TO_TORCH[dtype]), self.type.layout)

    def permute(self, *order: Any) -> Value:
        return permute(self, order[0] if len(order) == 1 else order)

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __invert__(self) -> Value:
        return Value(~self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _promoted(*values: Any) -> list[Tensor]:
    """As Triton promotes: tiles and scalars alike, Python's numbers only between integer, float and neither."""
    dtypes = [v.data.dtype for v in values if not _is_number(v)]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.tensor(values).dtype
    if dtypes and any(isinstance(v, float) for v in values) and not dtype.is_floating_point:
        dtype = torch.float32
    if dtype == torch.bool and any(type(v) is int for v in values):
        dtype = torch.int32
    return [torch.tensor(v, dtype=dtype) if _is_number(v) else v.data.to(dtype) for v in values]


def _operator(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def apply(self: Value, other: Any) -> Any:
        if not (_is_number(other) or type(other) is Value):
            return NotImplemented
        return Value(function(*_promoted(self, other)))

    return apply


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.div,
    "floordiv": _divide,
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
}
for _name, _function in _OPERATORS.items():
    setattr(Value, f"__{_name}__", _operator(_function))
    setattr(Value, f"__r{_name}__", _operator(lambda a, b, f=_function: f(b, a)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Value, f"__{_name}__", _operator(getattr(torch, _name)))


class Pending:
    """The sum of a product that is under way; only another product may take it before it is waited for."""

    def __init__(self, data: Tensor) -> None:
        self.data = data


class Pointer:
    """An address in each element of ``offset``, in elements from the tensor's first."""

    def __init__(self, memory: Tensor, offset: Tensor) -> None:
        self.memory, self.offset = memory, offset

    @staticmethod
    def to_tensor(tensor: Tensor) -> Pointer:
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.as_strided(tensor, (reach if tensor.numel() else 0,), (1,))
        return Pointer(flat, torch.tensor(0))

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=_FROM_TORCH[self.memory.dtype])

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + (other if _is_number(other) else other.data))

    def to(self, dtype: Any) -> Any:
        if isinstance(dtype, gl.pointer_type):
            memory = self.memory.view(_TO_TORCH[dtype.element_ty])
            size, other_size = self.memory.element_size(), memory.element_size()
            assert not (self.offset * size % other_size).any(), "unaligned"
            return Pointer(memory, self.offset * size // other_size)
        assert dtype == gl.int64
        return Value(self.memory.data_ptr() + self.offset * self.memory.element_size())

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        mask = torch.tensor(True) if mask is None else _promoted(mask)[0]
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        wrong = mask & ((offset < 0) | (offset >= self.memory.numel()))
        if wrong.any():
            where = offset[wrong][0]
            raise InterpreterError(f"element {where} of a tensor that has {self.memory.numel()}")
        return torch.where(mask, offset, 0), mask


class Accesses(threading.local):
    """Of a partition to shared memory, until all its threads know of them.

    written   places, each with whether a fence has shown it to the tensor cores
    read      places by products, each with whether the product was waited for
    """

    def __init__(self) -> None:
        self.written: list[tuple[range, bool]] = []
        self.read: list[tuple[range, bool]] = []

    def fence(self) -> None:
        self.written = [(place, True) for place, _ in self.written]

    def wait(self) -> None:
        self.read = [(place, True) for place, _ in self.read]

    def meet(self) -> None:
        """A barrier of the partition."""
        self.written = [(place, fenced) for place, fenced in self.written if not fenced]
        self.read = [(place, waited) for place, waited in self.read if not waited]

    def write(self, place: range) -> None:
        if any(_overlap(place, other) for other, _ in self.read):
            raise InterpreterError("a tile is written that a product may still read")
        self.written.append((place, False))

    def multiply(self, place: range) -> None:
        if any(_overlap(place, other) for other, _ in self.written):
            raise InterpreterError("a product reads a tile that is not yet there for all threads")
        self.read.append((place, False))


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


class Shared:
    """A tile, or a stack of them, in shared memory."""

    def __init__(self, data: Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout

    dtype = Value.dtype
    shape = Value.shape

    def index(self, number: Any) -> Shared:
        return Shared(self.data[int(number)], self.layout)

    def permute(self, order: Any) -> Shared:
        return Shared(self.data.permute(*map(int, order)), self.layout)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(start), int(length)), self.layout)

    def reshape(self, shape: Any) -> Shared:
        return Shared(self.data.view(*map(int, shape)), self.layout)

    def reinterpret(self, dtype: Any, shape: Any, layout: Any) -> Shared:
        """The memory, or its beginning, as another tile."""
        size = math.prod(map(int, shape))
        return Shared(
            self.data.view(_TO_TORCH[dtype]).view(-1)[:size].view(*map(int, shape)), layout
        )

    _reinterpret = reinterpret

    def load(self, layout: Any = None) -> Value:
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        if (self.shape, self.dtype) != (value.shape, value.dtype):
            raise InterpreterError(f"{value.dtype}{value.shape} into {self.dtype}{self.shape}")
        _accesses.write(self.place)
        self.data.copy_(value.data)

    @property
    def place(self) -> range:
        reach = 1 + sum(
            (n - 1) * s for n, s in zip(self.data.shape, self.data.stride(), strict=True)
        )
        start = self.data.data_ptr()
        return range(start, start + reach * self.data.element_size())


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.arrivals = self.bytes = self.phase = 0

    def arrive(self, arrivals: int = 1, num_bytes: int = 0) -> None:
        with self.changed:
            self.arrivals += arrivals
            self.bytes += num_bytes
            if self.arrivals > self.count:
                raise InterpreterError("more arrivals than a barrier counts")
            if self.arrivals == self.count and self.bytes == 0:
                self.arrivals, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        """For the end of the phase of a parity; that of the phase before the first counts as ended."""
        with self.changed:
            if not self.changed.wait_for(lambda: _failed or self.phase & 1 != parity, _SECONDS):
                raise InterpreterError("a barrier that nobody completes")
            if _failed:
                raise InterpreterError("another partition failed")


class Barriers:
    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, number: Any) -> Barrier:
        return self.all[int(number)]


class Descriptor:
    """Of a tensor [rows, columns] for the copy engine."""

    def __init__(self, host: Any) -> None:
        self.tensor, self.layout = host.base, host.layout
        self.block_shape, self.shape = tuple(host.block_shape), tuple(host.shape)

    @property
    def dtype(self) -> Any:
        return _FROM_TORCH[self.tensor.dtype]

    def part(self, offsets: Sequence[Any]) -> tuple[slice, ...]:
        firsts = [int(o) for o in offsets]
        ends = zip(firsts, self.block_shape, self.shape, strict=True)
        return tuple(slice(f, max(f, min(f + size, n))) for f, size, n in ends)


_failed: list[BaseException] = []
_accesses = Accesses()


class Program(threading.local):
    """That a thread runs."""

    id, number = 0, 1


_program = Program()
_counting = threading.Lock()


# ------------------------------------------------------------------ the language


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Value:
    offset, inside = pointer.places(mask)
    found = pointer.memory[offset].clone()
    if mask is not None and other is not None:
        found = torch.where(inside, found, torch.tensor(other).to(found.dtype))
    return Value(found)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    offset, inside = pointer.places(mask)
    data = (torch.tensor(value) if _is_number(value) else value.data).to(pointer.memory.dtype)
    pointer.memory[offset[inside]] = data.expand_as(offset)[inside]


def atomic_add(pointer: Pointer, value: Any, **_: Any) -> Value:
    if _failed:
        raise InterpreterError("another program failed")
    with _counting:
        before = load(pointer)
        store(pointer, before + value)
    return before


def where(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(one, Pointer):  # of all threads alike
        return one if condition else other
    return Value(torch.where(*_promoted(condition), *_promoted(one, other)))


def _reduction(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Value]:
    def reduce(value: Value, axis: Any = None, **_: Any) -> Value:
        data = value.data.reshape(-1) if axis is None else value.data
        return Value(function(data, 0 if axis is None else int(axis)))

    return reduce


def _without_nan(data: Tensor, axis: int, function: Callable[..., Tensor], worst: float) -> Tensor:
    if not data.is_floating_point():
        return function(data, axis)
    found = function(torch.where(data.isnan(), worst, data), axis)
    return torch.where(data.isnan().all(axis), torch.nan, found).to(data.dtype)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    return Value(value.data.reshape(*map(int, shape)))


def permute(value: Value, order: Sequence[int]) -> Value:
    return Value(value.data.permute(*map(int, order)))


def split(value: Value) -> tuple[Value, Value]:
    one, other = value.data.unbind(-1)
    return Value(one), Value(other)


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    several = isinstance(dtype, tuple)
    dtypes = [_TO_TORCH[d] for d in (dtype if several else (dtype,))]
    tensors = [torch.tensor(a) if _is_number(a) else a.data for a in args]
    results = [Value(r) for r in run_elementwise(asm, constraints, tensors, dtypes, pack)]
    return tuple(results) if several else results[0]


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return Barriers(int(shape[0]))
    memory = torch.empty([int(n) for n in shape], dtype=_TO_TORCH[dtype])
    # What nobody wrote is NaN or far from any result.
    memory.view(torch.uint8).fill_(0x7F)
    if memory.dtype.is_floating_point:
        memory.view(torch.uint8).fill_(0xFF)
    return Shared(memory, layout)


def warp_specialize(partitions: Sequence[Any], num_warps: Any, num_registers: Any) -> None:
    calls = [functools.partial(function, *args) for function, args in partitions]
    _at_a_time(calls, [_program.id] * len(calls))


def _at_a_time(calls: Sequence[Callable[[], Any]], ids: Sequence[int]) -> None:
    """Threads of their own, each of a program."""
    number = _program.number

    def run(call: Callable[[], Any], program: int) -> None:
        _program.id, _program.number = program, number
        try:
            call()
        except BaseException as error:
            _failed.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(calls, ids, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if _failed:
        raise _failed[0]


def _check_product(a: Any, b: Any, acc: Any) -> None:
    if a.dtype != b.dtype or acc.data.shape != (a.shape[0], b.shape[1]):
        raise InterpreterError(f"{a.dtype}{a.shape} x {b.dtype}{b.shape} + {acc.data.shape}")


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
) -> Any:
    _check_product(a, b, acc)
    for operand in (a, b):
        if isinstance(operand, Shared):
            _accesses.multiply(operand.place)
    if not is_async:
        _accesses.wait()
    integers = a.dtype == gl.int8
    wide = torch.int32 if integers else torch.float32
    total = a.data.to(wide) @ b.data.to(wide)
    if use_acc:
        total = acc.data + total
    if total.dtype != acc.data.dtype:
        raise InterpreterError(f"a sum in {acc.data.dtype} of {a.dtype}")
    return Pending(total) if is_async else Value(total)


def mma_v2(a: Value, b: Value, acc: Value) -> Value:
    _check_product(a, b, acc)
    return Value(acc.data + a.data.float() @ b.data.float())


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    if num_outstanding == 0:
        _accesses.wait()
    results = tuple(Value(d.data) if isinstance(d, Pending) else d for d in deps)
    return results[0] if len(results) == 1 else results


def copy_to_shared(
    source: Descriptor, offsets: Sequence[Any], barrier: Barrier, target: Shared
) -> None:
    if target.shape != source.block_shape:
        raise InterpreterError(f"a tile {source.block_shape} into {target.shape}")
    found = source.tensor[source.part(offsets)]
    target.data.view(torch.uint8).zero_()
    target.data[tuple(slice(n) for n in found.shape)] = found
    barrier.arrive(0, -target.data.numel() * target.data.element_size())


def copy_from_shared(target: Descriptor, offsets: Sequence[Any], source: Shared) -> None:
    place = target.tensor[target.part(offsets)]
    place.copy_(source.data[tuple(slice(n) for n in place.shape)])


def _init_barrier(barrier: Barrier, count: int) -> None:
    barrier.count = count


def _scalars(*bounds: Any) -> Iterator[Value]:
    return (Value(i) for i in range(*(int(b) for b in bounds)))


def _assert(condition: Any, message: str = "") -> None:
    assert condition, message


class _Language:
    """``gl``: what is above, and otherwise its own types and layouts."""

    load, store, atomic_add, where = map(staticmethod, (load, store, atomic_add, where))
    inline_asm_elementwise = staticmethod(inline_asm_elementwise)
    allocate_shared_memory = staticmethod(allocate_shared_memory)
    warp_specialize = staticmethod(warp_specialize)
    reshape, permute, split = map(staticmethod, (reshape, permute, split))
    static_range = staticmethod(range)
    static_assert = staticmethod(_assert)
    sum = staticmethod(_reduction(lambda d, axis: d.sum(axis, dtype=d.dtype)))
    max = staticmethod(_reduction(lambda d, a: _without_nan(d, a, torch.amax, -torch.inf)))
    min = staticmethod(_reduction(lambda d, a: _without_nan(d, a, torch.amin, torch.inf)))
    convert_layout = staticmethod(lambda value, layout, **_: Value(value.data, layout))
    multiple_of = max_contiguous = staticmethod(lambda value, _: value)
    program_id = staticmethod(lambda axis: Value(_program.id))
    num_programs = staticmethod(lambda axis: Value(_program.number))
    arange = staticmethod(
        lambda first, end, layout=None: Value(torch.arange(first, end, dtype=torch.int32))
    )
    zeros = staticmethod(
        lambda shape, dtype, layout=None: Value(torch.zeros(*shape, dtype=_TO_TORCH[dtype]))
    )
    full = staticmethod(
        lambda shape, value, dtype, layout=None: Value(
            torch.full([int(n) for n in shape], float(value), dtype=_TO_TORCH[dtype])
        )
    )
    cdiv = staticmethod(lambda a, b: (a + (b - 1)) // b)
    minimum = staticmethod(lambda a, b: Value(torch.minimum(*_promoted(a, b))))
    maximum = staticmethod(lambda a, b: Value(torch.maximum(*_promoted(a, b))))
    join = staticmethod(lambda a, b: Value(torch.stack(_promoted(a, b), -1)))
    expand_dims = staticmethod(lambda value, axis: Value(value.data.unsqueeze(axis)))
    rsqrt = staticmethod(lambda value: Value(torch.rsqrt(value.data)))
    exp = staticmethod(lambda value: Value(torch.exp(value.data)))
    erf = staticmethod(lambda value: Value(torch.erf(value.data)))
    abs = staticmethod(lambda value: Value(value.data.abs()))

    def __getattr__(self, name: str) -> Any:
        found = getattr(gl, name)
        if inspect.isclass(found) or isinstance(found, gl.dtype):
            return found
        raise InterpreterError(f"gl.{name} is not interpreted yet")


_MBARRIER = types.SimpleNamespace(
    MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    init=_init_barrier,
    expect=lambda barrier, num_bytes, **_: barrier.arrive(1, int(num_bytes)),
    arrive=lambda barrier, count=1, **_: barrier.arrive(count),
    wait=lambda barrier, phase, **_: barrier.wait(int(phase)),
)
_TMA = types.SimpleNamespace(store_wait=lambda pendings=0: None)


def _fence(*_: Any, **__: Any) -> None:
    _accesses.fence()


def _meet() -> None:
    _accesses.meet()


def _names() -> dict[int, Any]:
    """What stands for an object of the language, by its id."""
    tma = hopper.tma
    pairs = [
        (gl, _Language()),
        (hopper.mbarrier, _MBARRIER),
        (tma, _TMA),
        (hopper.warpgroup_mma, warpgroup_mma),
        (hopper.warpgroup_mma_wait, warpgroup_mma_wait),
        (hopper.fence_async_shared, _fence),
        (ampere.mma_v2, mma_v2),
    ]
    for module, names, ours in (
        (tma, ("async_load", "async_copy_global_to_shared"), copy_to_shared),
        (tma, ("async_store", "async_copy_shared_to_global"), copy_from_shared),
        (gl, ("barrier", "thread_barrier"), _meet),
    ):
        pairs += [(getattr(module, name), ours) for name in names if hasattr(module, name)]
    return {id(theirs): ours for theirs, ours in pairs}


class _Functions:
    """Jitted functions as Python, in namespaces of their own."""

    def __init__(self) -> None:
        self._names = _names()
        self._namespaces: dict[int, dict[str, Any]] = {}

    def python(self, jitted: Any) -> Callable[..., Any]:
        raw = jitted.fn
        namespace = self._namespaces.get(id(raw.__globals__))
        if namespace is None:
            namespace = self._namespaces[id(raw.__globals__)] = {
                "__builtins__": vars(builtins) | {"range": _scalars}
            }
            for name, value in raw.__globals__.items():
                if name != "__builtins__":
                    namespace[name] = self._converted(value)
        return types.FunctionType(
            raw.__code__, namespace, raw.__name__, raw.__defaults__, raw.__closure__
        )

    def _converted(self, value: Any) -> Any:
        if id(value) in self._names:
            return self._names[id(value)]
        if isinstance(value, gl.constexpr):
            return value.value
        kind = type(value).__name__
        if kind == "ConstexprFunction":
            return value.fn
        if kind.endswith("JITFunction"):
            return lambda *args, **kwargs: self.python(value)(*args, **kwargs)
        return value


def run(
    kernel: Any, num_programs: int, operands: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    """Run a kernel's programs on tensors, descriptors of tensors, integers and None."""
    function = _Functions().python(kernel)
    names = kernel.arg_names
    arguments = dict(zip(names, map(_operand, operands), strict=False))
    arguments |= {name: constants[name] for name in names[len(operands) :]}
    _program.number = num_programs
    _failed.clear()
    if constants.get("PARTS", 1) > 1:  # its programs wait for each other
        calls = [functools.partial(function, **arguments)] * num_programs
        return _at_a_time(calls, range(num_programs))
    for _program.id in range(num_programs):
        _accesses.__init__()
        function(**arguments)


def _operand(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer.to_tensor(value)
    if isinstance(value, int):
        return Value(value)
    return Descriptor(value) if hasattr(value, "block_shape") else value


class InterpretedLaunch:
    """In the place of ``launches.Launch``."""

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self._kernel, self._constants = kernel, constants

    def __call__(self, device: torch.device, num_programs: int, *operands: Any) -> None:
        run(self._kernel, num_programs, operands, self._constants)
