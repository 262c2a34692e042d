"""Ways to call a model: decode steps, other lengths, dtypes, instances, embeddings from outside."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from model_zoo import IMAGE_ID, MASK_ID, build, picture_inputs, text_ids
from random_transforms import random_transform
from recording import Recorder, Seen, wrong_types
from torch import Tensor, nn
from tracing import checks_of_transformers, expected_types, logits_of, relative
from transformers import AttentionInterface

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.checkpoint import PackedEntry, fingerprint
from freeact_fx.transform import pack_linear

MASKED = TokenTypes.mask_token(MASK_ID)
PICTURES = TokenTypes.image_tokens(IMAGE_ID)


def compiled(
    model: nn.Module, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any
) -> tuple[Any, Recorder]:
    recorder = Recorder(model, **options)
    return torch.no_grad()(recorder.compile(fullgraph=fullgraph, dynamic=dynamic)), recorder


def default_only(seen: dict[str, Seen]) -> bool:
    """True if every token of every Linear is of type 0."""
    return all(
        s.default_type == 0 and (s.types is None or not bool(s.types.any())) for s in seen.values()
    )


# ------------------------------------------------------------------------------------- decode steps


def cache_of(model: nn.Module, output: Any) -> dict[str, Any]:
    """The cache that a call left, by the name that this version of transformers has for it."""
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    return {name: getattr(output, name)}


def test_a_decode_step_is_all_default_and_shares_the_packed_weights() -> None:
    """Left padding included: the first step after it has no first position either."""
    model = build("llama")
    run, recorder = compiled(model, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    output = run(input_ids=ids, attention_mask=mask, use_cache=True)
    prefill = recorder.take()
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert wrong_types(prefill, expected_types(inputs, MASKED)) == {}
    for step in range(3):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        output = run(
            input_ids=text_ids(2, 1, seed=step),
            attention_mask=mask,
            use_cache=True,
            **cache_of(model, output),
        )
        decode = recorder.take()
        assert default_only(decode)
        assert {s.leading for s in decode.values()} == {(2, 1)}
        assert all(decode[name].weight is prefill[name].weight for name in prefill)
    # Prefill, the first step, and steps with a cache of any length.
    assert [g.num_calls for g in recorder.graphs] == [1, 1, 2]
    states = {f.state for g in recorder.graphs[1:] for f in g.linears}
    # By its id a token could be of a type; there is none in sight otherwise.
    assert states == {"typed"}
    assert recorder.graphs[1].linears[0].type_source == f"input_ids == {MASK_ID} -> masked"


@torch.compiler.disable
def attention_outside(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    """As a kernel that Dynamo cannot trace: each layer is three graphs, and its output is a new tensor to them."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    causal = mask is None and query.shape[2] > 1
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal
    )
    return output.transpose(1, 2), None


def test_layers_that_are_cut_at_their_attention() -> None:
    model = build("llama")
    AttentionInterface.register("outside", attention_outside)
    model.set_attn_implementation("outside")
    run, recorder = compiled(model, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    types = MASKED.from_ids(ids)
    with freeact_fx.token_types(types):
        output = run(input_ids=ids, use_cache=True)
    prefill = recorder.take()
    assert len(prefill) == 14
    assert wrong_types(prefill, types) == {}
    # The embedding runs outside any graph too, so that without help nothing is known; it is said, not guessed.
    with pytest.warns(UserWarning, match="the token types of the graph with .* are not known"):
        run(input_ids=ids[:, :1], use_cache=True, **cache_of(model, output))
    decode = recorder.take()
    assert len(decode) == 14
    assert default_only(decode)
    assert all(decode[name].weight is prefill[name].weight for name in prefill)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_generate_with_pictures(name: str) -> None:
    """The tower runs apart from forward; then come prefill, a first step, and steps of any length."""
    model = build(name)
    recorder = Recorder(model, token_types=PICTURES)
    model.forward = torch.compile(model.forward, backend=recorder)
    inputs = picture_inputs(name, padding=(0, 2))
    steps: list[dict[str, Seen]] = []
    model.register_forward_hook(lambda *args: steps.append(recorder.take()))
    with checks_of_transformers(False), torch.no_grad():
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    prefill, *decode = steps
    assert len(prefill) == 14
    assert wrong_types(prefill, expected_types(inputs, PICTURES)) == {}
    assert len(decode) == 4
    for step in decode:
        assert {s.leading for s in step.values()} == {(2, 1)}
        assert default_only(step)
        assert all(step[n].weight is prefill[n].weight for n in prefill)
    # Prefill is one graph or, with older transformers, several; of decode steps a first, and one of any length.
    assert [g.num_calls for g in recorder.graphs[-2:]] == [1, 3]


# ------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert", "bidirectional"])
def test_a_new_length_recompiles_once(name: str) -> None:
    run, recorder = compiled(build(name), fullgraph=True, token_types=MASKED)
    for seed, (batch, length) in enumerate([(2, 16), (2, 24), (2, 40), (2, 17), (2, 100)]):
        for masked in (0.0, 0.3, 1.0):
            ids = text_ids(batch, length, masked=masked, seed=seed)
            run(input_ids=ids)
            seen = recorder.take()
            assert len(seen) >= 9
            assert wrong_types(seen, expected_types({"input_ids": ids}, MASKED)) == {}
    assert len(recorder.graphs) == 2


@pytest.mark.parametrize("name", ["llama", "bidirectional"])
def test_batch_and_length_may_both_be_symbols(name: str) -> None:
    """With a padding mask, whose batch size is another symbol to Dynamo."""
    run, recorder = compiled(build(name), fullgraph=True, dynamic=True, token_types=MASKED)
    for batch, length in [(2, 16), (3, 24), (5, 17)]:
        ids = text_ids(batch, length, masked=0.3, seed=batch)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        run(input_ids=ids, attention_mask=mask)
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert wrong_types(recorder.take(), expected_types(inputs, MASKED)) == {}
    assert len(recorder.graphs) == 1


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_picture_model_in_one_graph_at_two_lengths(name: str) -> None:
    model = build(name)
    # Llava's tower takes a lock, at which fullgraph=True gives up (and without it the graph is whole).
    run, recorder = compiled(model, fullgraph=name != "llava", token_types=PICTURES)
    with checks_of_transformers(False):
        with torch.no_grad():  # Hugging Face installs hooks at the first call
            model(**picture_inputs(name))
        for length, starts in [(32, (3, 9)), (32, (0, 12)), (40, (20, 1)), (51, (3, 30))]:
            inputs = picture_inputs(name, starts=starts, length=length)
            run(**inputs, use_cache=False)
            expected = expected_types(inputs, PICTURES)
            assert wrong_types(recorder.take(), expected) == {}
    assert len(recorder.graphs) == 2


# ------------------------------------------------------------------------------------- no declared types


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2.5-vl"])
def test_merges_are_found_without_declared_ids(name: str) -> None:
    """With the default options, across the graph breaks that the checks make."""
    run, recorder = compiled(build(name))
    with checks_of_transformers(True):
        for starts in ((3, 9), (12, 0)):
            inputs = picture_inputs(name, starts=starts, padding=(1, 0))
            run(**inputs, use_cache=False)
            seen = recorder.take()
            assert len(seen) == 14
            assert wrong_types(seen, expected_types(inputs, PICTURES)) == {}


# ------------------------------------------------------------------------------------- dtypes, instances, calls


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bf16(name: str) -> None:
    model = build(name).to(torch.bfloat16)
    run, recorder = compiled(model, fullgraph=True, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    output = logits_of(run(input_ids=ids))
    assert output.dtype == torch.bfloat16
    with torch.no_grad():
        want = logits_of(model(input_ids=ids))
    assert relative(output, want) < 0.5
    assert wrong_types(recorder.take(), expected_types({"input_ids": ids}, MASKED)) == {}


def test_bf16_without_quantisers_differs_by_rounding_only() -> None:
    model = build("llama")
    ids = text_ids(2, 16)
    with torch.no_grad():
        exact = logits_of(model(input_ids=ids))
        plain = logits_of(model.to(torch.bfloat16)(input_ids=ids))
    run, _ = compiled(model, token_types=MASKED, quantize=False)
    ours = logits_of(run(input_ids=ids))
    # The transforms run in fp32; where they hand over to bf16 is where the model would have.
    assert relative(ours, exact) < 1.5 * relative(plain, exact)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_by_position(name: str) -> None:
    """Ids and padding mask without their names."""
    run, recorder = compiled(build(name), fullgraph=True, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    run(ids, mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert wrong_types(recorder.take(), expected_types(inputs, MASKED)) == {}


def test_a_second_instance_has_its_own_weights() -> None:
    first, second = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    ids = text_ids(2, 16, masked=0.3)
    outputs = []
    weights = []
    for model in (first, second):
        run, recorder = compiled(model, token_types=MASKED)
        output = logits_of(run(input_ids=ids))
        with torch.no_grad():
            want = logits_of(model(input_ids=ids))
        assert relative(output, want) < 0.6
        outputs.append(output)
        seen = recorder.take()
        assert len(seen) == 14
        weights.append({id(s.weight) for s in seen.values()})
    assert relative(*outputs) > 0.6
    assert not weights[0] & weights[1]


# ------------------------------------------------------------------------------------- embeddings from outside


def embeddings(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_embeds_with_token_types(name: str) -> None:
    model = build(name)
    run, recorder = compiled(model, fullgraph=True, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    with freeact_fx.token_types(MASKED.from_ids(ids)):
        run(inputs_embeds=embeddings(model, ids))
    # What is given is what is used, first positions included.
    expected = expected_types({"input_ids": ids}, MASKED, first=False)
    assert wrong_types(recorder.take(), expected) == {}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_embeds_without_token_types_warn_once(name: str) -> None:
    model = build(name)
    run, recorder = compiled(model, fullgraph=True, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    message = (
        r"freeact: the token types of the graph with \S+ are not known \(its hidden states come in from "
        r"outside the graph\); its Linears use the default type 'unmasked'"
    )
    with pytest.warns(UserWarning, match=message):
        run(inputs_embeds=embeddings(model, ids))
    first_only = expected_types({"input_ids": torch.full_like(ids, 3)}, MASKED)
    assert wrong_types(recorder.take(), first_only) == {}
    run(inputs_embeds=embeddings(model, ids))  # a second warning would be an error
    sources = {f.type_source for f in recorder.facts.values()}
    assert sources == {"first position; otherwise as token_types() or an earlier graph says"}


def test_inputs_embeds_of_segments_given_by_the_caller() -> None:
    """BERT's segments are ids too, of a table of two rows: they are not the tokens."""
    model = build("bert")
    run, recorder = compiled(model, fullgraph=True, token_types=MASKED)
    ids = text_ids(2, 16, masked=0.3)
    with freeact_fx.token_types(MASKED.from_ids(ids)):
        run(inputs_embeds=embeddings(model, ids), token_type_ids=torch.zeros_like(ids))
    expected = expected_types({"input_ids": ids}, MASKED, first=False)
    assert wrong_types(recorder.take(), expected) == {}


def test_inputs_embeds_of_a_picture_model() -> None:
    """Hugging Face finds the picture tokens by comparing embeddings then: a mask that names no id."""
    model = build("llava")
    run, recorder = compiled(model)
    inputs = picture_inputs("llava")
    ids = inputs.pop("input_ids")
    with checks_of_transformers(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(inputs_embeds=embeddings(model, ids), **inputs, use_cache=False)
    inputs["input_ids"] = ids
    assert wrong_types(recorder.take(), expected_types(inputs, PICTURES)) == {}


# ------------------------------------------------------------------------------------- reports


# Dynamo's own, when it traces Gemma's masks.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["bert", "bidirectional", "llava", "gemma3", "smolvlm", "qwen2.5-vl"]
)
def test_explain_of_one_graph_lists_every_linear_once(name: str) -> None:
    """With graph breaks: test_explained_models.py."""
    model = build(name)
    pictures = name not in ("bert", "bidirectional")
    inputs = picture_inputs(name) if pictures else {"input_ids": text_ids(2, 16)}
    with checks_of_transformers(False):
        options = {"token_types": PICTURES}
        report = freeact_fx.explain(model, **inputs, options=options, code=True)
    listed = Counter(linear.name for linear in report.linears)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # Gemma's projector is a bare parameter and a product.
    extra = {"model.multi_modal_projector"} if name == "gemma3" else set()
    assert set(listed) == linears | extra
    assert set(listed.values()) == {1}
    assert not [r.name for r in report.linears if r.reason == "no graph has it"]
    if name == "gemma3":
        row = report["model.vision_tower.head.attention.out_proj"]
        assert row.reason == "its weight is read by multi_head_attention_forward, not by a linear"
    assert all(r.quantized or (r.reason and r.way_out) for r in report.linears)
    # What the report counts is in the rewritten graphs: one product per Linear, one transform per group.
    code = "\n".join(graph.after or "" for graph in report.graphs)
    assert code.count("freeact.int_mm(") == report.counts()["quantized"] > 0
    assert code.count("freeact.transform_quantize(") == report.counts()["groups"]
    groups = [group.members for group in report.groups]
    assert all(n in linears for group in groups for n in group)
    assert sum(len(group) for group in groups) == len(report.quantized)


def test_explain_of_a_compiled_model_lists_the_layers_that_share_a_graph() -> None:
    model = build("qwen2.5-vl")
    run, _ = compiled(model, token_types=PICTURES)
    with checks_of_transformers(False):
        run(**picture_inputs("qwen2.5-vl"), use_cache=False)
    report = freeact_fx.explain(torch.compile(model, backend="freeact"))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(r.name for r in report.linears) == sorted(linears)
    assert not [r.name for r in report.linears if r.reason and "no graph" in r.reason]
    assert report.counts()["quantized"] == 14


# ------------------------------------------------------------------------------------- paper


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 64)
        self.linear = nn.Linear(64, 48)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.embedding(input_ids))


def test_paper_is_the_projection_that_it_predicts() -> None:
    """Each type keeps a subspace of its own; what comes out is the float Linear of what is left of a token."""
    torch.manual_seed(0)
    model = OneLinear().eval()
    config = QuantConfig(token_types=MASKED, sink=None)
    transform = random_transform("paper", 64, 2, seed=0)
    weight, bias = model.linear.weight.detach(), model.linear.bias.detach()
    entry = PackedEntry(
        "linear", 64, pack_linear(transform, weight, bias, config), fingerprint(weight)
    )
    checkpoint = Checkpoint(config, {"linear": transform}, {"linear": entry})
    run, recorder = compiled(model, fullgraph=True, checkpoint=checkpoint, quantize=False)
    ids = text_ids(4, 32, masked=0.4)
    got = run(ids)
    assert wrong_types(recorder.take(), (ids == MASK_ID).int()) == {}

    scale = transform.channel_scale.double()
    kept, start = [], 0
    for width in transform.widths:
        left = transform.left[:, start : start + width].double()
        subspace = torch.kron(left @ torch.linalg.pinv(left), torch.eye(64 // len(left)).double())
        kept.append(scale[:, None] * subspace / scale)
        start += width
    x = model.embedding(ids).detach().double()
    for type_index, projection in enumerate(kept):
        shift = transform.shift[type_index].double()
        left_over = (x - shift) @ projection + shift
        want = left_over @ weight.double().t() + bias.double()
        here = ids == type_index * MASK_ID if type_index else ids != MASK_ID
        assert relative(got[here], want[here]) < 1e-5
    with torch.no_grad():
        assert relative(got, model(ids)) > 0.1
