"""Arithmetic of the transform for Hopper in PTX: two bf16 to an instruction, codes, activation functions."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def larger(one, other):
    """NaN if one of them is."""
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, $2;", "=f,f,f", [one, other], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    """Exact to 2^-23; 0 above 2^126."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def to_fp32(x):
    """Two bf16 of a register in two instructions; the compiler takes three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000; }",
            "=r,=r,r",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(gl.float32)


@gluon.jit
def minus(one, other):
    return gl.inline_asm_elementwise(
        "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def times(one, other):
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def times_plus(one, other, third):
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [one, other, third],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def larger_magnitude(one, other):
    """As a modifier of its operands a magnitude costs nothing."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b;
        abs.f32 a, $1;
        abs.f32 b, $2;
        max.f32 $0, a, b;
        }""",
        "=f,f,f",
        [one, other],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def two_parts(x):
    """The two bf16 whose sum is x to 2^-18; the first is the upper half of a register."""
    bits = x.to(gl.int32, bitcast=True) + 0x8000
    high = (bits >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    rest = x - (bits & -0x10000).to(gl.float32, bitcast=True)
    return high, rest.to(gl.bfloat16)


@gluon.jit
def to_int4(z, per_unit):
    """``14 * z * per_unit`` to the nearest integers in [-7, 7].

    Saturation is free where it is to [0, 1]; what is then added makes the low byte of an fp32 the integer.
    """
    # 0.5, 14, and 1.5 * 2^23 - 7
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b32 low, high;
        fma.rn.sat.f32 a, $1, $5, 0f3F000000;
        fma.rn.sat.f32 b, $2, $6, 0f3F000000;
        fma.rn.sat.f32 c, $3, $7, 0f3F000000;
        fma.rn.sat.f32 d, $4, $8, 0f3F000000;
        fma.rn.f32 a, a, 0f41600000, 0f4B3FFFF9;
        fma.rn.f32 b, b, 0f41600000, 0f4B3FFFF9;
        fma.rn.f32 c, c, 0f41600000, 0f4B3FFFF9;
        fma.rn.f32 d, d, 0f41600000, 0f4B3FFFF9;
        prmt.b32 low, a, b, 0x0040;
        prmt.b32 high, c, d, 0x0040;
        prmt.b32 $0, low, high, 0x5410;
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [z, per_unit],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def to_e4m3(z, per_unit):
    """``z * per_unit`` to the nearest e4m3 values, as bytes."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b16 low, high;
        mul.rn.f32 a, $1, $5;
        mul.rn.f32 b, $2, $6;
        mul.rn.f32 c, $3, $7;
        mul.rn.f32 d, $4, $8;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a;
        cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [z, per_unit],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def sigmoid(x):
    """In approximate functions of the chip, exact to about 2^-21."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 $0, e;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def activation(x, KIND: gl.constexpr):
    """As in ``transform_prologue``."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x * sigmoid(x)
