"""Where tokens come into a graph, and where a sequence begins: found right, or left open, never guessed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording import Recorder, Seen
from torch import Tensor, nn

import freeact_fx
from freeact_fx import TokenTypes
from freeact_fx.passes import annotate, roots
from freeact_fx.passes.node_facts import Root, TokenFact

B = T = 4
H = 64
MASK = 9
MASKED = TokenTypes.mask_token(MASK)


def ids() -> Tensor:
    return torch.tensor([[1, 9, 9, 2], [9, 1, 8, 9], [9, 3, 4, 7], [1, 2, 8, 4]])


def masked(tokens: Tensor) -> list[Any]:
    return (tokens == MASK).int().tolist()


class Tables(nn.Module):
    """Tables and Linears."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, H)
        self.positions = nn.Embedding(128, H)
        self.segments = nn.Embedding(2, H)
        self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)
        self.register_buffer("position_ids", torch.arange(T)[None], persistent=False)


def model_of(forward: Callable[..., Any], rows: int = 10) -> nn.Module:
    """Tables and Linears with a function as ``forward``: its arguments keep their names."""
    return type("Model", (Tables,), {"forward": forward})(rows)


def run(
    model: nn.Module, *args: Any, kwargs: dict[str, Any] | None = None, **options: Any
) -> tuple[dict[str, Seen], Recorder]:
    options = {"token_types": MASKED, "sink": None} | options
    recorder = Recorder(model.eval(), **options)
    with torch.no_grad():
        recorder.compile(fullgraph=True)(*args, **(kwargs or {}))
    return recorder.take(), recorder


def types_of(seen: Seen) -> list[Any]:
    types = torch.full(seen.leading, seen.default_type) if seen.types is None else seen.types
    return types.tolist()


# ------------------------------------------------------------------------------------- which embedding


def with_segments(m: Any, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
    x = m.segments(token_type_ids) + m.words(input_ids) + m.positions(m.position_ids)
    return m.first(F.layer_norm(x, (H,)))


def counted_positions(m: Any, input_ids: Tensor) -> Tensor:
    """As RoBERTa and ESM do it: positions are counted from the ids, and ESM's vocabulary is the smaller table."""
    positions = (input_ids != 1).int().cumsum(1)
    return m.first(m.positions(positions) + m.words(input_ids))


def given_positions(m: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    return m.first(m.positions(position_ids) + m.words(input_ids))


POSITIONS = torch.arange(T).expand(B, T) + 7  # one of them looks like [MASK]
WHICH: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "segments": (with_segments, (ids(), (ids() > 3).long())),
    "positions counted from the ids": (counted_positions, (ids(),)),
    "positions given by the caller": (given_positions, (ids(), POSITIONS)),
}


@pytest.mark.parametrize("name", WHICH)
@pytest.mark.parametrize("rows", [10, 1000], ids=["small vocabulary", "large vocabulary"])
def test_the_vocabulary_is_told_from_other_tables(name: str, rows: int) -> None:
    function, args = WHICH[name]
    seen, recorder = run(model_of(function, rows), *args)
    assert types_of(seen["first"]) == masked(ids())
    assert recorder.facts["first"].type_source == "input_ids == 9 -> masked"


@functools.wraps(given_positions)
def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return given_positions(self, *args, **kwargs)


@functools.wraps(given_positions)
def wrapped_with_itself(*args: Any, **kwargs: Any) -> Tensor:
    return given_positions(*args, **kwargs)


@pytest.mark.parametrize("forward", [wrapped, wrapped_with_itself])
def test_arguments_behind_a_wrapper_keep_their_names(forward: Callable[..., Tensor]) -> None:
    """As Hugging Face wraps ``forward``: called by position, the arguments have no names in the graph."""
    seen, recorder = run(model_of(forward), ids(), POSITIONS)
    assert types_of(seen["first"]) == masked(ids())
    assert recorder.facts["first"].type_source == "input_ids == 9 -> masked"


# ------------------------------------------------------------------------------------- views, copies, changes of ids


def shifted(m: Any, input_ids: Tensor) -> Tensor:
    return m.first(m.words(input_ids)[:, :-1])


def flattened(m: Any, input_ids: Tensor) -> Tensor:
    return m.first(m.words(input_ids.view(-1))).view(B, T, H)


def reshaped_there_and_back(m: Any, input_ids: Tensor) -> Tensor:
    return m.first(m.words(input_ids.reshape(-1)).view(*input_ids.shape, H))


def cast_and_copied(m: Any, input_ids: Tensor) -> Tensor:
    return m.first(m.words(input_ids.clone().to(torch.int32).contiguous()))


def noised(m: Any, input_ids: Tensor, noise: Tensor) -> Tensor:
    return m.first(m.words(torch.where(noise, MASK, input_ids)))


def replaced(m: Any, input_ids: Tensor) -> Tensor:
    """As PaliGemma does it: an id outside the vocabulary is replaced before the look-up."""
    inside = input_ids.clone()
    inside[input_ids == MASK] = 0
    return m.first(m.words(inside))


def prefixed(m: Any, input_ids: Tensor) -> Tensor:
    start = torch.full((input_ids.shape[0], 1), MASK)
    return m.first(m.words(torch.cat([start, input_ids], 1)))


NOISE = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
CHANGED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]] = {
    "a slice": (shifted, (ids(),), ids()[:, :-1]),
    "flattened": (flattened, (ids(),), ids().view(-1)),
    "there and back": (reshaped_there_and_back, (ids(),), ids()),
    "cast and copied": (cast_and_copied, (ids(),), ids()),
    "noise added in the graph": (noised, (ids(), NOISE), torch.where(NOISE, MASK, ids())),
    "replaced before the look-up": (replaced, (ids(),), torch.zeros(B, T)),
    "a prefix": (prefixed, (ids(),), torch.cat([torch.full((B, 1), MASK), ids()], 1)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_types_are_those_of_the_ids_that_are_looked_up(name: str) -> None:
    function, args, looked_up = CHANGED[name]
    seen, _ = run(model_of(function), *args)
    assert types_of(seen["first"]) == masked(looked_up)


def two_steps(m: Any, input_ids: Tensor) -> Tensor:
    """Two denoising steps in one graph; the ids are written in place between them."""
    x = m.first(m.words(input_ids))
    input_ids[:, 1] = 5
    return x + m.second(m.words(input_ids))


def test_ids_written_between_two_look_ups() -> None:
    seen, _ = run(model_of(two_steps), ids())
    after = ids()
    after[:, 1] = 5
    assert types_of(seen["first"]) == masked(ids())
    assert types_of(seen["second"]) == masked(after)


def guided(m: Any, input_ids: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
    return m.first(m.words(input_ids)), m.second(m.words(unconditional))


def test_two_inputs_of_one_vocabulary() -> None:
    other = torch.tensor([[9, 1, 9]])
    seen, _ = run(model_of(guided), ids(), other)
    assert types_of(seen["first"]) == masked(ids())
    assert types_of(seen["second"]) == masked(other)
    # Explicit types are for the input whose shape they have.
    given = torch.ones(1, 3, dtype=torch.int32)
    with freeact_fx.token_types(given):
        seen, _ = run(model_of(guided), ids(), other)
    assert types_of(seen["first"]) == masked(ids())
    assert types_of(seen["second"]) == given.tolist()


def chosen_tokens(m: Any, input_ids: Tensor) -> Tensor:
    return m.first(m.words(input_ids[input_ids != 1]))


def test_a_number_of_tokens_that_depends_on_data_is_refused() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _, recorder = run(model_of(chosen_tokens), ids())
    assert recorder.facts["first"].state == "refused"
    assert recorder.facts["first"].type_source == (
        "how many tokens there are is not known before the graph runs"
    )


# ------------------------------------------------------------------------------------- hidden states


def embedded(m: Any, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
    return m.first(F.layer_norm(m.positions(position_ids) + inputs_embeds, (H,)))


def embedded_with_segments(m: Any, inputs_embeds: Tensor, token_type_ids: Tensor) -> Tensor:
    return m.first(m.segments(token_type_ids) + inputs_embeds)


def merged(m: Any, features: Tensor, inputs_embeds: Tensor, input_ids: Tensor) -> Tensor:
    """A decoder cut off by a graph break: the pictures come first among the arguments, and have its width."""
    features = features.to(torch.float32)
    x = inputs_embeds.masked_scatter((input_ids == 7).unsqueeze(-1), features)
    return m.second(m.first(x))


GIVEN = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]])
HIDDEN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "beside positions": (embedded, (torch.randn(B, T, H), POSITIONS)),
    "beside segments": (embedded_with_segments, (torch.randn(B, T, H), (ids() > 3).long())),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize(
    "types", [TokenTypes.explicit("a", "b"), TokenTypes.mask_token(200)], ids=["explicit", "ids"]
)
def test_hidden_states_are_told_from_what_is_added_to_them(name: str, types: TokenTypes) -> None:
    function, args = HIDDEN[name]
    with freeact_fx.token_types(GIVEN):
        seen, _ = run(model_of(function), *args, token_types=types)
    assert types_of(seen["first"]) == GIVEN.tolist()
    message = "the token types of the graph with first are not known"
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=message):
        run(model_of(function), *args, token_types=types)


def test_what_a_merge_writes_is_not_the_root() -> None:
    tokens = ids()
    features = torch.randn(int((tokens == 7).sum()) + 3, H)
    model = model_of(merged)
    seen, recorder = run(
        model, features, torch.randn(B, T, H), tokens, token_types=TokenTypes.auto()
    )
    assert types_of(seen["first"]) == types_of(seen["second"]) == (tokens == 7).int().tolist()
    assert recorder.graphs[0].runner.trailing.roots[0].holders == (
        _argument(recorder, "inputs_embeds"),
    )


def _argument(recorder: Recorder, name: str) -> int:
    placeholders = [n for n in recorder.graphs[0].module.graph.nodes if n.op == "placeholder"]
    return next(i for i, n in enumerate(placeholders) if name in n.name)


class Tower(nn.Module):
    """Patches of pictures [n, K]: floating, of two dimensions, and no tokens of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))

    def forward(self, patches: Tensor) -> Tensor:
        return self.visual(patches)


def test_a_tower_alone_asks_for_no_types() -> None:
    # Types of the text do not fit its patches, and need not: it has none.
    with freeact_fx.token_types(GIVEN):
        seen, recorder = run(Tower(), torch.randn(16, H))
    assert seen == {}
    assert recorder.graphs[0].runner.trailing.roots == []
    assert {f.type_source for f in recorder.facts.values()} == {
        "none: its name says that it is an encoder's"
    }


def test_a_tower_that_is_asked_for_runs_as_the_default_type() -> None:
    seen, recorder = run(Tower(), torch.randn(16, H), vision_tower=True)
    assert [(s.types, s.default_type) for s in seen.values()] == [(None, 0)] * 2
    assert recorder.facts["visual.0"].state == "default"


# ------------------------------------------------------------------------------------- first positions


def attend(m: Any, x: Tensor, **mask: Any) -> Tensor:
    y = m.first(x)
    return m.second(x + F.scaled_dot_product_attention(y, y, y, **mask))


def by_hand(m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    y = m.first(x)
    scores = y @ y.transpose(1, 2) / 8
    scores = scores if mask is None else scores + mask
    return m.second(x + scores.softmax(-1) @ y)


def no_mask(m: Any, input_ids: Tensor) -> Tensor:
    return attend(m, m.words(input_ids), is_causal=True)


def no_mask_by_hand(m: Any, input_ids: Tensor) -> Tensor:
    return by_hand(m, m.words(input_ids))


def constant_mask(m: Any, input_ids: Tensor) -> Tensor:
    return attend(m, m.words(input_ids), attn_mask=torch.ones(T, T).tril().bool())


def with_attention_mask(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return attend(m, m.words(input_ids), attn_mask=attention_mask[:, None].bool())


def with_attention_mask_by_hand(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return by_hand(m, m.words(input_ids), (1.0 - attention_mask[:, None].float()) * -1e9)


def flattened_attention(m: Any, input_ids: Tensor) -> Tensor:
    x = m.words(input_ids.view(-1)).view(B, T, H)
    return attend(m, x)


def with_an_empty_cache(m: Any, input_ids: Tensor) -> Tensor:
    x = m.words(input_ids)
    y = m.first(x)
    keys = torch.cat([torch.ones(B, 0, H), y], 1)
    return m.second(x + F.scaled_dot_product_attention(y, keys, keys))


PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]])
ALL_FIRST = [0, 0, 0, 0]
KNOWN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], list[int]]] = {
    "no mask": (no_mask, (), ALL_FIRST),
    "no mask, by hand": (no_mask_by_hand, (), ALL_FIRST),
    "a constant mask": (constant_mask, (), ALL_FIRST),
    "flattened ids": (flattened_attention, (), ALL_FIRST),
    "an empty cache": (with_an_empty_cache, (), ALL_FIRST),
    "padding": (with_attention_mask, (PADDED,), [2, 0, 1, 0]),
    "padding, by hand": (with_attention_mask_by_hand, (PADDED,), [2, 0, 1, 0]),
}


def with_first(tokens: Tensor, positions: list[int]) -> list[list[int]]:
    types = masked(tokens)
    for row, position in enumerate(positions):
        types[row][position] = 2
    return types


@pytest.mark.parametrize("name", KNOWN)
def test_the_first_position_is_known(name: str) -> None:
    function, rest, positions = KNOWN[name]
    seen, recorder = run(model_of(function), ids(), *rest, sink="first")
    assert all(types_of(s) == with_first(ids(), positions) for s in seen.values())
    assert recorder.facts["first"].type_source == "input_ids == 9 -> masked; first position"


def no_attention(m: Any, input_ids: Tensor) -> Tensor:
    """Cut off before its attention: it could be a decode step."""
    return m.first(m.words(input_ids))


def with_a_cache(m: Any, input_ids: Tensor, cache: Tensor) -> Tensor:
    x = m.words(input_ids)
    y = m.first(x)
    keys = torch.cat([cache, y], 1)
    return m.second(x + F.scaled_dot_product_attention(y, keys, keys))


def with_a_cache_by_hand(m: Any, input_ids: Tensor, cache: Tensor) -> Tensor:
    x = m.words(input_ids)
    y = m.first(x)
    keys = torch.cat([cache, y], 1)
    return m.second(x + (y @ keys.transpose(1, 2)).softmax(-1) @ keys)


def with_a_static_cache(m: Any, input_ids: Tensor, cache: Tensor) -> Tensor:
    """As many keys as queries, but they are not the queries' own tokens."""
    x = m.words(input_ids)
    y = m.first(x)
    cache = cache.clone()
    cache[:, 1:3] = y[:, :2]
    return m.second(x + F.scaled_dot_product_attention(y, cache, cache))


def with_a_mask_of_its_own(m: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    return attend(m, m.words(input_ids), attn_mask=mask)


def with_a_mask_of_its_own_by_hand(m: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    return by_hand(m, m.words(input_ids), mask)


def with_a_mask_from_the_ids(m: Any, input_ids: Tensor) -> Tensor:
    return attend(m, m.words(input_ids), attn_mask=(input_ids != 1)[:, None])


def with_a_mask_from_the_ids_by_hand(m: Any, input_ids: Tensor) -> Tensor:
    return by_hand(m, m.words(input_ids), (input_ids == 1)[:, None] * -1e9)


def with_a_router(m: Any, input_ids: Tensor) -> Tensor:
    """A softmax over as many experts as there are tokens is no attention."""
    x = m.first(m.words(input_ids))
    return m.second(x * (x[..., :T]).softmax(-1)[..., :1])


def beside_a_tower(m: Any, input_ids: Tensor, patches: Tensor) -> Tensor:
    """A tower that attends to as many patches as there are tokens tells nothing about the tokens."""
    y = F.scaled_dot_product_attention(patches, patches, patches)
    x = m.words(input_ids).masked_scatter((input_ids == 7)[..., None], y)
    return m.first(x)


UNKNOWN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "no attention": (no_attention, ()),
    "a cache": (with_a_cache, (torch.randn(B, 3, H),)),
    "a cache, by hand": (with_a_cache_by_hand, (torch.randn(B, 3, H),)),
    "a static cache": (with_a_static_cache, (torch.randn(B, T, H),)),
    "a mask of its own": (with_a_mask_of_its_own, (torch.ones(B, T, T).bool(),)),
    "a mask of its own, by hand": (with_a_mask_of_its_own_by_hand, (torch.zeros(B, T, T),)),
    "a mask from the ids": (with_a_mask_from_the_ids, ()),
    "a mask from the ids, by hand": (with_a_mask_from_the_ids_by_hand, ()),
    "a router": (with_a_router, ()),
    "a tower": (beside_a_tower, (torch.randn(B, T, H),)),
}
TWO_TYPES = TokenTypes(
    (*MASKED.types, freeact_fx.TokenType("vision", merge=True)),
)


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_first_position_is_left_open(name: str) -> None:
    function, rest = UNKNOWN[name]
    types = TWO_TYPES if name == "a tower" else MASKED
    seen, _ = run(model_of(function), ids(), *rest, sink="first", token_types=types)
    expected = torch.tensor(masked(ids()))
    if name == "a tower":
        expected[ids() == 7] = 2
    assert all(types_of(s) == expected.tolist() for s in seen.values())


@pytest.mark.parametrize("name", ["a cache", "a cache, by hand", "no attention"])
def test_a_decode_step_of_one_token_has_no_first_position(name: str) -> None:
    function, rest = UNKNOWN[name]
    tokens = torch.tensor([[3], [4], [3], [4]])
    seen, recorder = run(model_of(function), tokens, *rest, sink="first")
    assert all(types_of(s) == [[0]] * B for s in seen.values())
    assert recorder.facts["first"].type_source == "input_ids == 9 -> masked"


def test_a_prompt_of_one_token_has_one() -> None:
    seen, _ = run(model_of(no_mask), torch.tensor([[3], [9]]), sink="first")
    assert all(types_of(s) == [[2], [2]] for s in seen.values())


# ------------------------------------------------------------------------------------- symbolic sizes


def test_sizes_may_be_symbols() -> None:
    model = model_of(with_attention_mask).eval()
    recorder = Recorder(model, token_types=MASKED)
    compiled = torch.no_grad()(recorder.compile(fullgraph=True, dynamic=True))
    for batch, length in ((2, 5), (3, 7), (5, 11)):
        tokens = torch.randint(0, 10, (batch, length))
        mask = torch.ones_like(tokens)
        mask[1, :2] = 0
        compiled(tokens, mask)
        positions = [0, 2] + [0] * (batch - 2)
        for seen in recorder.take().values():
            assert types_of(seen) == with_first(tokens, positions)
    assert len(recorder.graphs) == 1


def test_explicit_types_for_symbolic_sizes_of_several_dimensions() -> None:
    def halves(m: Any, x: Tensor) -> Tensor:
        return m.first(x.flatten(0, 1))

    recorder = Recorder(
        model_of(halves).eval(), token_types=TokenTypes.explicit("a", "b"), sink=None
    )
    compiled = torch.no_grad()(recorder.compile(fullgraph=True, dynamic=True))
    for batch, length in ((2, 5), (3, 7)):
        given = torch.randint(0, 2, (batch, length))
        with freeact_fx.token_types(given):
            compiled(torch.randn(batch, length, H))
        assert types_of(recorder.take()["first"]) == given.flatten().tolist()
    assert len(recorder.graphs) == 1


# ------------------------------------------------------------------------------------- planted faults


def any_root_knows(gm: Any, facts: Any) -> None:
    """Row 0 is the first position, whatever the graph shows."""
    for node in gm.graph.nodes:
        fact = facts(node)
        if isinstance(fact, TokenFact):
            for root in roots.roots_of(fact.expr):
                root.sink_known = True


def same_size_is_enough(node: Any, facts: Any) -> Any:
    if roots.op_name(node) == "scaled_dot_product_attention":
        query, key = (n.meta["example_value"].shape[-2] for n in node.args[:2])
        fact = facts(node.args[0])
        if isinstance(fact, TokenFact) and query == key:
            return roots.roots_of(fact.expr)[0], True, set()
    return _self_attention(node, facts)


def masks_tell_nothing(node: Any, facts: Any) -> Any:
    found = _self_attention(node, facts)
    return found and (*found[:2], set())


def padding_unseen(node: Any, root: Root) -> bool:
    return False


_self_attention = roots._self_attention
ROWS_ONLY = {"_vocabulary_rank": lambda lookup, config: roots._rows(lookup[1])}
FAULTS: dict[str, tuple[Any, dict[str, Any], Callable[[], None]]] = {
    "the largest table is the vocabulary": (
        roots,
        ROWS_ONLY,
        lambda: test_the_vocabulary_is_told_from_other_tables("positions given by the caller", 10),
    ),
    "positions counted from ids are ids": (
        roots,
        {
            "_is_counted_from_ids": lambda lookup, others: False,
            "_holds_declared_ids": lambda *a: True,
        },
        lambda: test_the_vocabulary_is_told_from_other_tables("positions counted from the ids", 10),
    ),
    "the first origin of ids counts": (
        roots,
        {"_ID_VIEWS": roots._ID_VIEWS | {"where"}},
        lambda: test_types_are_those_of_the_ids_that_are_looked_up("noise added in the graph"),
    ),
    "writes of ids unseen": (
        roots,
        {"written_by": lambda node: None},
        test_ids_written_between_two_look_ups,
    ),
    "what is added to hidden states is the root": (
        roots,
        {"_is_beside": lambda *args: False},
        lambda: test_hidden_states_are_told_from_what_is_added_to_them(
            "beside positions", TokenTypes.explicit("a", "b")
        ),
    ),
    "what a merge writes may be the root": (
        roots,
        {
            "_tokens_above": lambda node: [
                n for n in node.graph.nodes if n in roots.ancestors([node])
            ]
        },
        test_what_a_merge_writes_is_not_the_root,
    ),
    "a tower may be the root": (
        roots,
        {"is_tower_name": lambda name: False},
        test_a_tower_alone_asks_for_no_types,
    ),
    "row 0 is always first": (
        annotate,
        {"find_first_positions": any_root_knows},
        lambda: test_a_decode_step_of_one_token_has_no_first_position("a cache"),
    ),
    "as many keys as queries is enough": (
        roots,
        {"_self_attention": same_size_is_enough},
        lambda: test_the_first_position_is_left_open("a static cache"),
    ),
    "masks tell nothing": (
        roots,
        {"_self_attention": masks_tell_nothing},
        lambda: test_the_first_position_is_left_open("a mask from the ids"),
    ),
    "no first position is ever known": (
        annotate,
        {"find_first_positions": lambda gm, facts: None},
        lambda: test_the_first_position_is_known("no mask, by hand"),
    ),
    "padding unseen": (
        roots,
        {"_is_padding_mask": padding_unseen},
        lambda: test_the_first_position_is_known("padding"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, wrong, check = FAULTS[name]
    check()
    torch._dynamo.reset()
    for attribute, value in wrong.items():
        monkeypatch.setattr(owner, attribute, value)
    with pytest.raises((AssertionError, ValueError, UserWarning, pytest.fail.Exception)):
        check()
