"""What an ``inline_asm_elementwise`` of our kernels computes: the few PTX instructions that they use, on tensors.

A register is a tensor int64 of bit patterns, one for each group of elements. Instructions that only give the hardware
advice, or wait for other kernels, do nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_NOTHING = ("ld.volatile.", "griddepcontrol.")


class UnknownInstruction(ValueError):
    """An instruction that this file does not know yet."""


def run_elementwise(
    asm: str, constraints: str, args: Sequence[Tensor], dtypes: Sequence[torch.dtype], pack: int
) -> list[Tensor]:
    """Outputs of the given dtypes and the shape that all args broadcast to; ``pack`` elements to a group."""
    kinds = [part.strip() for part in constraints.split(",")]
    args = torch.broadcast_tensors(*args) if args else [torch.zeros(())]
    shape = args[0].shape
    # What is not a whole group is filled up.
    padding = -args[0].numel() % pack
    registers: dict[str, Tensor] = {}
    number = sum(kind.startswith("=") for kind in kinds)
    for arg in args if len(kinds) > number else ():
        flat = torch.cat([arg.reshape(-1), arg.reshape(-1)[-1:].expand(padding)])
        for register in _to_registers(flat.view(-1, pack)):
            registers[f"${number}"] = register
            number += 1
    assert number == len(kinds), f"{constraints!r} is not for these operands"
    _run(asm, registers)
    results, number = [], 0
    for dtype in dtypes:
        count = max(1, pack * dtype.itemsize // 4)
        words = [registers.get(f"${number + i}", torch.zeros(1).long()) for i in range(count)]
        number += count
        flat = _from_registers(words, dtype, pack).reshape(-1)
        results.append(flat[: flat.numel() - padding or None].expand(shape.numel()).reshape(shape))
    return results


def _to_registers(groups: Tensor) -> list[Tensor]:
    size = groups.element_size()
    groups = groups.contiguous()
    if size == 8:
        return list(groups.view(torch.int64).unbind(-1))
    if size * groups.shape[1] < 4:
        groups = torch.cat([groups] * (4 // (size * groups.shape[1])), -1)
    return [word.long() & _WORD for word in groups.view(torch.int32).unbind(-1)]


def _from_registers(words: list[Tensor], dtype: torch.dtype, pack: int) -> Tensor:
    return _as_int32(torch.stack(words, -1)).view(dtype)[:, :pack]


def _as_int32(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.int32)[..., ::2].contiguous()  # the lower halves


def _floats(bits: Tensor) -> Tensor:
    return _as_int32(bits).view(torch.float32)


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous().view(torch.int32).long() & _WORD


def _run(asm: str, registers: dict[str, Tensor]) -> None:
    body = re.sub(r"//.*", "", asm).strip()
    if body.startswith("{"):
        body = body[1 : body.rindex("}")]
    for statement in filter(None, map(str.strip, body.split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg" or name.startswith(_NOTHING):
            continue
        target, *operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        values = [_operand(operand, registers) for operand in operands]
        result = _compute(name, values)
        if target.startswith("{"):
            low, high = (part.strip() for part in target[1:-1].split(","))
            registers[low], registers[high] = result & 0xFFFF, result >> 16
        else:
            registers[target] = result


def _operand(text: str, registers: dict[str, Tensor]) -> Tensor:
    if text.startswith("{"):  # halves of a word, the low one first
        low, high = (_operand(part.strip(), registers) for part in text[1:-1].split(","))
        return low & 0xFFFF | (high & 0xFFFF) << 16
    if text in registers:
        return registers[text]
    value = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
    return torch.tensor([value & _WORD])


def _compute(name: str, values: list[Tensor]) -> Tensor:
    operation, *modifiers = name.split(".")
    kind = modifiers[-1]
    if operation == "mov":
        return values[0]
    if operation == "cvt":
        if modifiers != ["rn", "satfinite", "e4m3x2", "f32"]:
            raise UnknownInstruction(name)
        high, low = (_floats(v).clamp(-448, 448).to(torch.float8_e4m3fn) for v in values)
        return low.view(torch.uint8).long() | high.view(torch.uint8).long() << 8
    if kind == "bf16x2":
        low, high = (
            [
                (v >> half & 0xFFFF).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
                for v in values
            ]
            for half in (0, 16)
        )
        halves = [_FLOAT[operation](*map(Tensor.double, h)).to(torch.bfloat16) for h in (low, high)]
        low_bits, high_bits = (h.view(torch.int16).long() & 0xFFFF for h in halves)
        return low_bits | high_bits << 16
    if kind == "f32" and operation in _FLOAT:
        function = torch.maximum if modifiers == ["NaN", "f32"] else _FLOAT[operation]
        result = function(*(_floats(v).double() for v in values))
        if "sat" in modifiers:
            result = result.nan_to_num(0.0).clamp(0, 1)
        return _bits(result)
    if kind in ("b32", "u32", "s32") and operation in _INTEGER:
        return _INTEGER[operation](*values) & _WORD
    raise UnknownInstruction(name)


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    result = torch.zeros_like(a | b | c)
    for row in range(8):
        if int(table) >> row & 1:
            parts = (v if row >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0)))
            first, second, third = parts
            result |= first & second & third
    return result


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    both, result = a | b << 32, torch.zeros_like(a | b)
    for place in range(4):
        choice = int(selector) >> 4 * place & 15
        byte = both >> 8 * (choice & 7) & 255
        if choice & 8:  # the sign, in all bits
            byte = (byte >> 7) * 255
        result |= byte << 8 * place
    return result


_FLOAT: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "fma": lambda a, b, c: a * b + c,
    "abs": torch.abs,
    "max": torch.fmax,
    "min": torch.fmin,
    "ex2": torch.exp2,
    "rcp": torch.reciprocal,
}
_INTEGER: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "lop3": _lop3,
    "prmt": _prmt,
}
