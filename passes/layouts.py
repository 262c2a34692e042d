"""How a layout (see ``node_facts``) changes under views, permutations, broadcasting and indexing.

All functions are pure and work on symbolic sizes. ``None`` as a result means: the token axes cannot be told any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from .node_facts import Axis, Layout, Size, TypeExpr, merge_axes, statically_equal


def is_one(size: Size) -> bool:
    """True if a size is 1 for sure. Axes of size 1 never appear in a layout: they say nothing."""
    return statically_equal(size, 1)


def is_token_axis(axis: Axis, expr: TypeExpr) -> bool:
    """True if an axis is, or was split from, an axis of the type tensor; False: it repeats types."""
    current: Axis | None = axis
    while current is not None:
        if any(current is a for a in expr.axes):
            return True
        current = current.parent
    return False


def layout_of_axes(axes: Sequence[Axis]) -> Layout:
    """The layout of the type tensor itself."""
    return tuple(() if is_one(a.size) else (a,) for a in axes)


def _expr(size: Size) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _product(sizes: Sequence[Size]) -> sympy.Expr:
    return sympy.Mul(*(_expr(s) for s in sizes))


def _pair_up(
    left: Sequence[Size], right: Sequence[Size]
) -> list[tuple[list[int], list[int]]] | None:
    """Cut two shapes of equal product into the smallest runs of equal product; None if sizes cannot be compared."""
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        if i == len(left) or j == len(right):
            return None
        run_left, run_right = [i], [j]
        i, j = i + 1, j + 1
        while True:
            a, b = _product([left[k] for k in run_left]), _product([right[k] for k in run_right])
            if sympy.simplify(a - b) == 0:
                break
            if sympy.cancel(a / b).is_integer and j < len(right):
                run_right.append(j)
                j += 1
            elif sympy.cancel(b / a).is_integer and i < len(left):
                run_left.append(i)
                i += 1
            elif i < len(left) and j < len(right):
                run_left.append(i)
                run_right.append(j)
                i, j = i + 1, j + 1
            else:
                return None
        pairs.append((run_left, run_right))
    return pairs


def reshape_layout(
    layout: Layout, old: Sequence[Size], new: Sequence[Size], expr: TypeExpr
) -> Layout | None:
    """The layout after a view from shape ``old`` to shape ``new``."""
    keep_old = [i for i, s in enumerate(old) if not is_one(s)]
    keep_new = [i for i, s in enumerate(new) if not is_one(s)]
    pairs = _pair_up([old[i] for i in keep_old], [new[i] for i in keep_new])
    if pairs is None:
        return None
    result: list[tuple[Axis, ...]] = [()] * len(new)
    for run_old, run_new in pairs:
        dims = [keep_old[i] for i in run_old]
        outs = [keep_new[i] for i in run_new]
        if all(not layout[d] for d in dims):
            continue
        # A feature dimension viewed together with tokens repeats their types: an axis of its own.
        anchor = next(layout[d][0] for d in dims if layout[d])
        axes: list[Axis] = []
        for position, d in enumerate(dims):
            axes += layout[d] or (anchor.derive(("repeat", position, str(old[d])), old[d]),)
        parts = _distribute(list(merge_axes(axes)), [new[d] for d in outs])
        if parts is None:
            return None
        for out, part in zip(outs, parts, strict=True):
            tokens = any(is_token_axis(a, expr) for a in part)
            result[out] = merge_axes(part) if tokens else ()
    return tuple(result)


def _distribute(axes: list[Axis], sizes: Sequence[Size]) -> list[tuple[Axis, ...]] | None:
    """Share a row-major run of axes out among new dimensions."""
    if len(sizes) == 1:
        return [tuple(axes)]
    pairs = _pair_up([a.size for a in axes], sizes)
    if pairs is None:
        return None
    result: list[tuple[Axis, ...]] = []
    for run_axes, run_sizes in pairs:
        run, parts = [axes[i] for i in run_axes], [sizes[i] for i in run_sizes]
        if len(parts) == 1:
            result.append(tuple(run))
        elif len(run) == 1:
            result += [(child,) for child in run[0].split(parts)]
        else:
            cut = _cut(run, parts)
            if cut is None:
                return None
            result += cut
    return result


def _cut(axes: list[Axis], sizes: Sequence[Size]) -> list[tuple[Axis, ...]] | None:
    """Cut axes in two where a dimension ends inside them; for numbers only."""
    result: list[tuple[Axis, ...]] = []
    pending = list(axes)
    for size in sizes:
        taken: list[Axis] = []
        missing = size
        while missing != 1:
            axis = pending.pop(0)
            if not isinstance(missing, int) or not isinstance(axis.size, int):
                return None
            if missing % axis.size:
                if axis.size % missing:
                    return None
                axis, back = axis.split([missing, axis.size // missing])
                pending.insert(0, back)
            taken.append(axis)
            missing //= axis.size
        result.append(tuple(taken))
    return result


def permute_layout(layout: Layout, dims: Sequence[int]) -> Layout:
    return tuple(layout[d] for d in dims)


def broadcast_layout(layout: Layout, old: Sequence[Size], new: Sequence[Size]) -> Layout | None:
    """The layout after broadcasting to ``new``, right-aligned; new or enlarged dimensions repeat types."""
    missing = len(new) - len(old)
    if missing < 0:
        return None
    result: list[tuple[Axis, ...]] = [()] * missing
    for axes, a, b in zip(layout, old, new[missing:], strict=True):
        if axes and not statically_equal(a, b):
            return None
        result.append(axes)
    return tuple(result)
