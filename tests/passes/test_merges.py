"""Where types come from: every kind of merge, the configured id at the embedding, explicit types, and who wins.

Traced by Dynamo, because that is what real graphs look like. The expected types are computed from the inputs by plain
Python; each mechanism is then broken on purpose, and the same check has to fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording import Recorder, Seen
from torch import Tensor, nn

import freeact_fx
from freeact_fx import ConfigError, TokenType, TokenTypes, runner
from freeact_fx.passes import annotate, roots
from freeact_fx.passes.annotate import _Sweep
from freeact_fx.passes.node_facts import Lost, TokenFact
from freeact_fx.passes.type_tensors import TypeTensors

B = T = 4  # equal, so that a mask laid over the wrong dimensions still fits
H = 64
IMAGE, VIDEO, MASK = 7, 8, 9


def ids() -> Tensor:
    return torch.tensor([[1, 7, 7, 2], [7, 1, 8, 9], [9, 3, 4, 7], [1, 2, 8, 4]])


def where_ids(types: dict[int, int]) -> list[list[int]]:
    """Types [B, T] of ``ids()``, by id; 0 for the others."""
    return [[types.get(i, 0) for i in row] for row in ids().tolist()]


class Merge(nn.Module):
    """Embeddings and pictures, merged by a function; a Linear on either side of the merge."""

    def __init__(self, merge: Callable[..., Tensor]) -> None:
        super().__init__()
        self.merge = merge
        self.embedding = nn.Embedding(10, H)
        self.encode = nn.Linear(H, H)
        self.after = nn.Linear(H, H)

    def forward(self, input_ids: Tensor, pictures: Tensor, *rest: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.after(self.merge(x, input_ids, self.encode(pictures), *rest))


def run(
    model: nn.Module, *inputs: Any, fullgraph: bool = True, **options: Any
) -> tuple[dict[str, Seen], Recorder]:
    recorder = Recorder(model.eval(), **({"sink": None} | options))
    with torch.no_grad():
        recorder.compile(fullgraph=fullgraph)(*inputs)
    return recorder.take(), recorder


def types_of(seen: Seen) -> list[Any]:
    types = torch.full(seen.leading, seen.default_type) if seen.types is None else seen.types
    return types.tolist()


def packed_pictures() -> Tensor:
    return torch.randn(int((ids() == IMAGE).sum()), H)


def unpacked_pictures() -> Tensor:
    return torch.randn(B, T, H)


def put(x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = values
    return x


def put_flat(x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    flat = x.reshape(B * T, H)
    chosen = mask.reshape(B * T)
    flat[chosen] = flat[chosen] * 0 + values
    return flat.reshape(B, T, H)


def put_rows(x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[mask, :] = values
    return x


PACKED: dict[str, Callable[..., Tensor]] = {
    "masked_scatter": lambda x, ids, v: x.masked_scatter((ids == IMAGE).unsqueeze(-1), v),
    "masked_scatter, expanded": lambda x, ids, v: x.masked_scatter(
        (ids == IMAGE)[..., None].expand_as(x), v
    ),
    "masked_scatter, in place": lambda x, ids, v: x.masked_scatter_((ids == IMAGE)[..., None], v),
    "masked_scatter, ne": lambda x, ids, v: x.masked_scatter(~(ids != IMAGE)[..., None], v),
    "index_put": lambda x, ids, v: torch.index_put(x, (ids == IMAGE,), v),
    "index_put in place": lambda x, ids, v: x.clone().index_put_((ids == IMAGE,), v),
    "setitem": lambda x, ids, v: put(x, ids == IMAGE, v),
    "setitem of rows": lambda x, ids, v: put_rows(x, ids == IMAGE, v),
    "setitem of all sequences in a row": lambda x, ids, v: put_flat(x, ids == IMAGE, v),
    "masked_scatter, turned": lambda x, ids, v: (
        x.transpose(0, 1).masked_scatter((ids == IMAGE).t()[..., None], v).transpose(0, 1)
    ),
    "a buffer that is filled": lambda x, ids, v: (
        torch.zeros(B, T, H).masked_scatter((ids == IMAGE)[..., None], v)
        + x.masked_fill((ids == IMAGE)[..., None], 0)
    ),
}
UNPACKED: dict[str, Callable[..., Tensor]] = {
    "where(vision, text)": lambda x, ids, v: torch.where((ids == IMAGE)[..., None], v, x),
    "where(text, vision)": lambda x, ids, v: torch.where((ids != IMAGE)[..., None], x, v),
    "where, not": lambda x, ids, v: torch.where(~(ids == IMAGE)[..., None], x, v),
    "where, logical_not": lambda x, ids, v: torch.where(
        torch.logical_not(ids.eq(IMAGE)).unsqueeze(2), x, v
    ),
    "where, two nots": lambda x, ids, v: torch.where(~(ids != IMAGE)[..., None], v, x),
}
MERGES = [
    *((name, merge, packed_pictures) for name, merge in PACKED.items()),
    *((name, merge, unpacked_pictures) for name, merge in UNPACKED.items()),
]


def _label(argument: Any) -> str:
    return argument if isinstance(argument, str) else ""


@pytest.mark.parametrize(("name", "merge", "pictures"), MERGES, ids=_label)
@pytest.mark.parametrize("types", [TokenTypes.auto(), TokenTypes.image_tokens(IMAGE)])
def test_every_kind_of_merge(
    name: str, merge: Callable[..., Tensor], pictures: Callable[[], Tensor], types: TokenTypes
) -> None:
    seen, recorder = run(Merge(merge), ids(), pictures(), token_types=types)
    assert types_of(seen["after"]) == where_ids({IMAGE: 1})
    assert recorder.facts["after"].state == "typed"
    # The Linear whose values are merged in holds no tokens of ours.
    assert recorder.facts["encode"].refusal == ("computes what is merged into the embeddings")
    assert set(seen) == {"after"}


def test_the_source_is_told() -> None:
    merge = PACKED["masked_scatter"]
    _, recorder = run(Merge(merge), ids(), packed_pictures())
    assert recorder.facts["after"].type_source == (
        "eq(input_ids, 7) -> unsqueeze -> masked_scatter -> vision"
    )
    _, recorder = run(
        Merge(merge), ids(), packed_pictures(), token_types=TokenTypes.image_tokens(7)
    )
    assert recorder.facts["after"].type_source == "input_ids == 7 -> vision"


def test_a_bool_input_as_mask() -> None:
    model = Merge(lambda x, ids, v, mask: x.masked_scatter(mask[..., None], v))
    mask = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    seen, recorder = run(model, ids(), torch.randn(4, H), mask)
    assert types_of(seen["after"]) == mask.int().tolist()
    assert recorder.facts["after"].type_source == "rest -> getitem -> masked_scatter -> vision"


def test_a_bool_input_in_a_where() -> None:
    model = Merge(lambda x, ids, v, mask: torch.where(mask[..., None], v, x))
    mask = ids() == IMAGE
    seen, _ = run(model, ids(), unpacked_pictures(), mask)
    assert types_of(seen["after"]) == where_ids({IMAGE: 1})


def test_an_or_of_ids_is_one_merge() -> None:
    model = Merge(
        lambda x, ids, v: x.masked_scatter(((ids == IMAGE) | (ids == VIDEO))[..., None], v)
    )
    count = int(((ids() == IMAGE) | (ids() == VIDEO)).sum())
    seen, recorder = run(model, ids(), torch.randn(count, H))
    assert types_of(seen["after"]) == where_ids({IMAGE: 1, VIDEO: 1})
    assert "eq(input_ids, 7) | eq(input_ids, 8) -> getitem -> masked_scatter" in (
        recorder.facts["after"].type_source
    )


def test_ids_of_two_types_in_one_mask_are_refused() -> None:
    model = Merge(lambda x, ids, v: torch.where(((ids == IMAGE) | (ids == VIDEO))[..., None], v, x))
    types = TokenTypes.image_tokens(IMAGE, video=VIDEO)
    _, recorder = run(model, ids(), unpacked_pictures(), token_types=types)
    assert recorder.facts["after"].state == "refused"
    assert recorder.facts["after"].type_source == (
        "where (where): eq(input_ids, 7) | eq(input_ids, 8): no one token type claims these ids; "
        "declare them in TokenTypes"
    )


def two_merges(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = torch.where((ids == IMAGE)[..., None], v, x)
    return torch.where((ids == VIDEO)[..., None], v, x)


def test_two_merges_of_declared_ids_are_two_types() -> None:
    types = TokenTypes.image_tokens(IMAGE, video=VIDEO)
    seen, _ = run(Merge(two_merges), ids(), unpacked_pictures(), token_types=types)
    assert types_of(seen["after"]) == where_ids({IMAGE: 1, VIDEO: 2})


def test_a_merge_keeps_the_types_of_other_declared_ids() -> None:
    types = TokenTypes(
        (TokenType("text"), TokenType("vision", merge=True), TokenType("masked", (MASK,)))
    )
    merge = PACKED["masked_scatter"]
    seen, _ = run(Merge(merge), ids(), packed_pictures(), token_types=types)
    assert types_of(seen["after"]) == where_ids({IMAGE: 1, MASK: 2})


def test_a_mask_without_a_name_does_not_rename_declared_ids() -> None:
    """Two bool inputs are two merges, but only one type is made by nameless merges: the ids know better."""
    types = TokenTypes.image_tokens(IMAGE, video=VIDEO)
    model = Merge(lambda x, ids, v, mask: torch.where(mask[..., None], v, x))
    mask = (ids() == VIDEO) | (ids() == 1)
    seen, _ = run(model, ids(), unpacked_pictures(), mask, token_types=types)
    assert types_of(seen["after"]) == where_ids({IMAGE: 1, VIDEO: 2, 1: 1})


def test_a_merge_of_nothing_declared_is_refused() -> None:
    merge = PACKED["masked_scatter"]
    types = TokenTypes.mask_token(MASK)
    seen, recorder = run(Merge(merge), ids(), packed_pictures(), token_types=types)
    assert recorder.facts["after"].state == "refused"
    assert recorder.facts["after"].type_source == (
        "masked_scatter (masked_scatter): eq(input_ids, 7): no one token type claims these ids; "
        "declare them in TokenTypes"
    )
    # It runs, as no type at all.
    assert seen["after"].types is None
    assert seen["after"].default_type == 2


def test_writing_where_the_ids_are_others_is_refused() -> None:
    """The mask names the tokens that stay: it does not say what the others become."""
    model = Merge(lambda x, ids, v: torch.where((ids != IMAGE)[..., None], v, x))
    _, recorder = run(model, ids(), unpacked_pictures())
    assert recorder.facts["after"].state == "refused"
    assert recorder.facts["after"].type_source == (
        "where (where): ne(input_ids, 7): written where the ids are others"
    )


# ------------------------------------------------------------------------------------- what is not a merge


def fill(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[ids == 1] = 0
    return x


NOT_MERGES: dict[str, Callable[..., Tensor]] = {
    "padding set to a number": fill,
    "padding set to zeros": lambda x, ids, v: torch.where(
        (ids == 1)[..., None], torch.zeros_like(x), x
    ),
    "padding filled": lambda x, ids, v: x.masked_fill((ids == 1)[..., None], 0),
    "values added under a mask": lambda x, ids, v: torch.index_put(
        x, (ids == IMAGE,), x[0, 0], accumulate=True
    ),
    "a count of ids": lambda x, ids, v: x + ((ids == IMAGE).sum() * H == v.numel()),
    "a mask of features": lambda x, ids, v: torch.where(torch.arange(H) < 3, x, 2 * x),
}


@pytest.mark.parametrize("name", NOT_MERGES)
def test_what_is_not_a_merge_leaves_the_types(name: str) -> None:
    seen, recorder = run(
        Merge(NOT_MERGES[name]),
        ids(),
        unpacked_pictures(),
        token_types=TokenTypes(
            (TokenType("text"), TokenType("vision", merge=True), TokenType("masked", (MASK,)))
        ),
    )
    assert types_of(seen["after"]) == where_ids({MASK: 2})
    assert recorder.facts["after"].type_source == "input_ids == 9 -> masked"


def written(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3] = v[:, :2]
    return x


def written_one(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2] = v[:, 0]
    return x


def written_at(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[torch.arange(B), ids[:, 0] % T] = v[:, 0]
    return x


def written_whole(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[:] = v
    return x


def written_through_a_view(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3].copy_(v[:, :2])
    return x


def copied_over(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x.copy_(v)
    return x


OVERWRITTEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a slice": (written, "setitem (setitem) writes tokens by position"),
    "one position": (written_one, "setitem (setitem) writes tokens by position"),
    "positions in a tensor": (written_at, "setitem (setitem) writes tokens by position"),
    "everything": (written_whole, "setitem (setitem) replaces all tokens"),
    "through a view": (written_through_a_view, "tokens are written through a view of x_1"),
    "copy_": (copied_over, "copy (copy_) replaces tokens"),
    "by position, functional": (
        lambda x, ids, v: torch.where((torch.arange(T) < 2)[None, :, None], v, x),
        "where (where) replaces tokens under a mask that shows no type",
    ),
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_tokens_that_are_overwritten_lose_their_types(name: str) -> None:
    merge, reason = OVERWRITTEN[name]
    types = TokenTypes.mask_token(MASK)
    seen, recorder = run(Merge(merge), ids(), unpacked_pictures(), token_types=types)
    assert recorder.facts["after"].state == "refused"
    assert recorder.facts["after"].type_source == reason
    assert seen["after"].default_type == 2


def features_written(x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[..., :32] = v[..., 32:]
    x[..., 0] = 0
    return x


def test_writing_features_keeps_the_types() -> None:
    types = TokenTypes.mask_token(MASK)
    seen, _ = run(Merge(features_written), ids(), unpacked_pictures(), token_types=types)
    assert types_of(seen["after"]) == where_ids({MASK: 1})


# ------------------------------------------------------------------------------------- modality experts


class Experts(nn.Module):
    """Each token goes through both Linears, and one result is kept."""

    def __init__(self, choose: Callable[..., Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.embedding = nn.Embedding(10, H)
        self.vision, self.text, self.shared = (nn.Linear(H, H) for _ in range(3))
        self.after = nn.Linear(H, H)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.shared(self.embedding(input_ids))
        mask = (input_ids == IMAGE)[..., None]
        return self.after(self.choose(mask, self.vision(x).relu(), self.text(x)))


@pytest.mark.parametrize(
    "choose",
    [
        lambda mask, vision, text: torch.where(mask, vision, text),
        lambda mask, vision, text: torch.where(~mask, text, vision),
    ],
    ids=["mask", "not mask"],
)
def test_the_arms_of_a_where_have_one_type_each(choose: Callable[..., Tensor]) -> None:
    types = TokenTypes.image_tokens(IMAGE)
    seen, recorder = run(Experts(choose), ids(), token_types=types)
    assert types_of(seen["vision"]) == [[1] * T] * B
    assert types_of(seen["text"]) == [[0] * T] * B
    assert types_of(seen["shared"]) == where_ids({IMAGE: 1})
    assert types_of(seen["after"]) == where_ids({IMAGE: 1})
    source = recorder.facts["vision"].type_source
    assert source == "eq(input_ids, 7) -> arm of where -> vision"


def test_of_three_types_only_the_named_arm_has_one() -> None:
    types = TokenTypes.image_tokens(IMAGE, video=VIDEO)
    model = Experts(lambda mask, vision, text: torch.where(mask, vision, text))
    seen, _ = run(model, ids(), token_types=types)
    assert types_of(seen["vision"]) == [[1] * T] * B
    assert types_of(seen["text"]) == where_ids({IMAGE: 1, VIDEO: 2})


# ------------------------------------------------------------------------------------- explicit types, precedence


class Embedded(nn.Module):
    """Hidden states come in from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)
        self.second = nn.Linear(H, H)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.first(x)
        return self.second(x if residual is None else x + residual)


GIVEN = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]])


def test_explicit_types_reach_hidden_states() -> None:
    types = TokenTypes.explicit("a", "b")
    with freeact_fx.token_types(GIVEN):
        seen, _ = run(Embedded(), torch.randn(B, T, H), token_types=types)
    assert types_of(seen["first"]) == types_of(seen["second"]) == GIVEN.tolist()


def test_explicit_types_without_a_batch() -> None:
    types = TokenTypes.explicit("a", "b")
    with freeact_fx.token_types(GIVEN[0]):
        seen, _ = run(Embedded(), torch.randn(T, H), token_types=types)
    assert types_of(seen["first"]) == GIVEN[0].tolist()


def test_explicit_types_of_another_shape_are_refused() -> None:
    types = TokenTypes.explicit("a", "b")
    message = (
        r"token_types\(types\): the tokens of the graph with first have shape \[4, 4\], types has "
        r"\[4, 3\]. Give one type per token of this call."
    )
    with freeact_fx.token_types(GIVEN[:, :3]), pytest.raises(ConfigError, match=message):
        run(Embedded(), torch.randn(B, T, H), token_types=types)


class Attending(nn.Module):
    """An ids root, a merge, and attention: every source that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, H)
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)

    def forward(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x.masked_scatter((input_ids == IMAGE)[..., None], pictures)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def test_the_order_of_precedence() -> None:
    """explicit > first > merge > declared id; -1 leaves it to the graph."""
    types = TokenTypes(
        (TokenType("text"), TokenType("vision", merge=True), TokenType("masked", (MASK,)))
    )
    options: dict[str, Any] = {"token_types": types, "sink": "first"}
    from_graph = where_ids({IMAGE: 1, MASK: 2})
    with_first = [[3, *row[1:]] for row in from_graph]
    seen, recorder = run(Attending(), ids(), packed_pictures(), **options)
    assert types_of(seen["qkv"]) == types_of(seen["out"]) == with_first
    assert recorder.facts["out"].type_source == (
        "input_ids == 9 -> masked; eq(input_ids, 7) -> getitem -> masked_scatter -> vision; first position"
    )
    given = torch.full((B, T), -1)
    given[:, 0], given[0, 1] = torch.tensor([0, -1, 2, 1]), 2
    expected = torch.where(given >= 0, given, torch.tensor(with_first))
    with freeact_fx.token_types(given):
        seen, _ = run(Attending(), ids(), packed_pictures(), **options)
    assert types_of(seen["qkv"]) == expected.tolist()


def test_explicit_types_win_behind_a_slice_and_a_merge() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, H)
            self.after = nn.Linear(H, H)

        def forward(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
            x = self.embedding(input_ids)[:, 1:]
            return self.after(torch.where((input_ids == IMAGE)[:, 1:, None], pictures, x))

    given = torch.tensor([[0, 0, -1, -1]] * B)
    with freeact_fx.token_types(given):
        seen, _ = run(Sliced(), ids(), torch.randn(B, T - 1, H))
    vision = torch.tensor(where_ids({IMAGE: 1}))
    assert types_of(seen["after"]) == torch.where(given >= 0, given, vision)[:, 1:].tolist()


# ------------------------------------------------------------------------------------- across graph breaks


class Broken(nn.Module):
    """A graph break after each step: ids -> mask -> merge -> two Linears."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.between = between
        self.embedding = nn.Embedding(10, H)
        self.first = nn.Linear(H, H)
        self.second = nn.Linear(H, H)

    def forward(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        mask = (input_ids == IMAGE)[..., None]
        torch._dynamo.graph_break()
        x = x.masked_scatter(mask, pictures)
        torch._dynamo.graph_break()
        x = x + self.first(x)
        torch._dynamo.graph_break()
        x = self.between(x)
        return self.second(x)


@pytest.mark.parametrize(
    "types",
    [
        TokenTypes.auto(),
        TokenTypes.image_tokens(IMAGE),
        TokenTypes(
            (TokenType("text"), TokenType("masked", (MASK,)), TokenType("vision", (), True))
        ),
    ],
    ids=["auto", "declared", "declared beside"],
)
def test_types_cross_graph_breaks(types: TokenTypes) -> None:
    seen, recorder = run(Broken(), ids(), packed_pictures(), fullgraph=False, token_types=types)
    vision = types.merge_index
    assert vision is not None
    declared = {i: n for n, t in enumerate(types.types) for i in t.token_ids}
    expected = where_ids({IMAGE: vision, **declared})
    assert len(recorder.graphs) == 4
    assert types_of(seen["first"]) == types_of(seen["second"]) == expected


def test_explicit_types_win_over_recorded_ones() -> None:
    given = torch.where(torch.rand(B, T) < 0.5, 0, -1)
    with freeact_fx.token_types(given):
        seen, _ = run(Broken(), ids(), packed_pictures(), fullgraph=False)
    expected = torch.where(given >= 0, given, torch.tensor(where_ids({IMAGE: 1})))
    assert types_of(seen["second"]) == expected.tolist()


def test_hidden_states_written_between_graphs_have_no_types() -> None:
    """In place, so that they are the same tensor: what was recorded for it is of no use any more."""

    @torch.compiler.disable
    def write(x: Tensor) -> Tensor:
        return x.copy_(torch.randn_like(x))

    message = "freeact: the token types of the graph with second are not known"
    with pytest.warns(UserWarning, match=message):
        seen, _ = run(Broken(write), ids(), packed_pictures(), fullgraph=False)
    assert types_of(seen["second"]) == [[0] * T] * B


def test_a_new_tensor_between_graphs_has_no_types_and_says_so_once() -> None:
    @torch.compiler.disable
    def other(x: Tensor) -> Tensor:
        return x * 2

    model = Broken(other).eval()
    recorder = Recorder(model, sink=None)
    compiled = torch.no_grad()(recorder.compile())
    message = (
        r"freeact: the token types of the graph with second are not known \(its hidden states come in "
        r"from outside the graph\); its Linears use the default type 'text'. Call the model inside "
        r"freeact_fx.token_types\(types\)."
    )
    with pytest.warns(UserWarning, match=message):
        compiled(ids(), packed_pictures())
    compiled(ids(), packed_pictures())  # a second warning would be an error
    source = recorder.facts["second"].type_source
    assert source == "default: text; otherwise as token_types() or an earlier graph says"


def test_a_residual_brings_the_types_of_a_new_tensor() -> None:
    """An operation outside the graph (custom attention) makes a new tensor; the residual beside it is known."""

    @torch.compiler.disable
    def attend(x: Tensor) -> Tensor:
        return x * 2

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, H)
            self.value, self.out, self.up = (nn.Linear(H, H) for _ in range(3))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            x = x + self.out(attend(self.value(x)))
            return self.up(x)

    types = TokenTypes.mask_token(MASK)
    seen, _ = run(Layer(), ids(), fullgraph=False, token_types=types)
    expected = where_ids({MASK: 1})
    assert all(types_of(s) == expected for s in seen.values())
    assert set(seen) == {"value", "out", "up"}


# ------------------------------------------------------------------------------------- planted faults


_mask_origin = annotate._mask_origin


def ignore_negation(mask: Any) -> Any:
    return _mask_origin(mask)._replace(negated=False)


def right_aligned(mask: Any, fact: TokenFact, *, aligned_left: bool) -> Any:
    return fact.layout[len(fact.layout) - mask.meta["example_value"].dim() :]


def no_merge(self: Any, node: Any, before: TokenFact, *rest: Any, **where: Any) -> TokenFact:
    return before


def lost_merge(self: Any, node: Any, before: TokenFact, *rest: Any, **where: Any) -> Lost:
    return Lost("a merge")


def always_nameless(self: Any, origin: Any) -> Any:
    return self.token_types.merge_index, "a mask", False


def always_named(self: Any, origin: Any) -> Any:
    return self.token_types.merge_index, "a mask", True


def transposed_mask(self: Any, mask: Any, layout: Any, axes: Any, types: Any) -> Any:
    mask = self.call(torch.ops.aten.select.int, mask, 2, 0)
    return self.call(torch.ops.aten.permute.default, mask, [1, 0])


def first_over_explicit(self: Any, expr: Any) -> Any:
    where = torch.ops.aten.where
    node, explicit = self._layer("base", expr), self._layer("explicit", expr)
    given = self.call(torch.ops.aten.ge.Scalar, explicit, 0)
    node = self.call(where.self, given, explicit, node)
    first = self._layer("first", expr)
    return self.call(where.ScalarSelf, first, self.config.sink_index, node)


def no_layer(self: Any, expr: Any) -> Any:
    return self._layer("base", expr)


def nothing_above(new: Any, old: Any) -> set[Any]:
    return set()


class Forgetful(dict[Any, Any]):
    def get(self, key: Any, default: Any = None) -> Any:
        return default


NOTICED = (AssertionError, RuntimeError, UserWarning, pytest.fail.Exception)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mechanism that is replaced by a wrong one, and the test that has to notice."""

    owner: Any
    name: str
    wrong: Any
    check: Callable[[], None]


def _merge_check(name: str, types: TokenTypes) -> Callable[[], None]:
    merge, pictures = next((m, p) for n, m, p in MERGES if n == name)
    return lambda: test_every_kind_of_merge(name, merge, pictures, types)


AUTO, DECLARED = TokenTypes.auto(), TokenTypes.image_tokens(IMAGE)
FAULTS = {
    "negation ignored": Fault(
        annotate, "_mask_origin", ignore_negation, _merge_check("where(text, vision)", AUTO)
    ),
    "merge ignored": Fault(_Sweep, "_merged", no_merge, _merge_check("index_put", AUTO)),
    "merge lost": Fault(_Sweep, "_merged", lost_merge, _merge_check("setitem", AUTO)),
    "where not looked at": Fault(
        _Sweep, "_shows_types", lambda self, origin: False, _merge_check("where, not", AUTO)
    ),
    "mask laid to the right": Fault(
        annotate, "_mask_layout", right_aligned, _merge_check("setitem", AUTO)
    ),
    "mask transposed": Fault(
        TypeTensors, "_mask_over", transposed_mask, _merge_check("masked_scatter", AUTO)
    ),
    "all masks nameless": Fault(
        _Sweep, "_type_of_mask", always_nameless, test_ids_of_two_types_in_one_mask_are_refused
    ),
    "all masks named": Fault(
        _Sweep,
        "_type_of_mask",
        always_named,
        test_a_mask_without_a_name_does_not_rename_declared_ids,
    ),
    "claimed too soon": Fault(
        _Sweep, "_already_claimed", lambda *a: True, _merge_check("masked_scatter", AUTO)
    ),
    "buffers without tokens": Fault(
        _Sweep, "_buffer_fact", lambda *a: None, _merge_check("a buffer that is filled", AUTO)
    ),
    "the tower not found": Fault(
        annotate, "only_above", nothing_above, _merge_check("masked_scatter", DECLARED)
    ),
    "fills are merges": Fault(
        annotate,
        "_is_constant",
        lambda value: False,
        lambda: test_what_is_not_a_merge_leaves_the_types("padding set to a number"),
    ),
    "in-place writes unseen": Fault(
        _Sweep,
        "_write",
        lambda *a: None,
        lambda: test_tokens_that_are_overwritten_lose_their_types("a slice"),
    ),
    "assignments unseen": Fault(
        annotate,
        "assign",
        lambda node, facts: facts(node.args[0]),
        lambda: test_tokens_that_are_overwritten_lose_their_types("one position"),
    ),
    "values under any mask are tokens of the same kind": Fault(
        annotate,
        "_has_own_tokens",
        lambda *a: False,
        lambda: test_tokens_that_are_overwritten_lose_their_types("by position, functional"),
    ),
    "arms untyped": Fault(
        annotate,
        "_exclusive",
        lambda arm, where: set(),
        lambda: test_the_arms_of_a_where_have_one_type_each(torch.where),
    ),
    "explicit types under the first position": Fault(
        TypeTensors, "_types", first_over_explicit, test_the_order_of_precedence
    ),
    "explicit types ignored": Fault(
        TypeTensors, "_types", no_layer, test_explicit_types_reach_hidden_states
    ),
    "residuals are other tokens": Fault(
        roots, "_is_like", lambda a, b: a is b, test_a_residual_brings_the_types_of_a_new_tensor
    ),
    "nothing recorded": Fault(
        runner,
        "_recorded",
        Forgetful(),
        lambda: test_types_cross_graph_breaks(TokenTypes.auto()),
    ),
    "writes between graphs unseen": Fault(
        runner,
        "_version",
        lambda tensor: 0,
        test_hidden_states_written_between_graphs_have_no_types,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.check()
    torch._dynamo.reset()
    monkeypatch.setattr(fault.owner, fault.name, fault.wrong)
    with pytest.raises(NOTICED):
        fault.check()
