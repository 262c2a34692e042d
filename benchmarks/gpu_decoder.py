"""Decoders of the shapes of LLaDA-8B and Qwen2.5-VL-7B with random weights, made where they run.

Plain PyTorch, so that a machine with a GPU needs nothing but torch: embedding (with image features merged in), rotary
attention, gated MLP, head. A step over a block of tokens reads keys and values of earlier ones from a buffer, into
which it writes its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from gpu_layers import quantized_linear, typed_transform
from gpu_peers import sharing_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.convert import GroupTransformModule


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder, and the input id that makes a token one of the second type.

    causal    attention to earlier tokens alone
    last_only only the last position's logits
    merged    that id stands for image features, which are merged into the embeddings
    """

    hidden: int
    mlp: int
    num_layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    special_id: int
    causal: bool
    last_only: bool
    merged: bool
    qkv_bias: bool

    @property
    def config(self) -> QuantConfig:
        """Two types and the sink, each with a mean of its own."""
        types = TokenTypes.image_tokens if self.merged else TokenTypes.mask_token
        return QuantConfig(token_types=types(self.special_id), plan="shift", skip=("head",))

    def with_layers(self, num_layers: int) -> DecoderShape:
        return dataclasses.replace(self, num_layers=num_layers)

    def tiny(self) -> DecoderShape:
        sizes = {"hidden": 64, "mlp": 192, "num_layers": 2, "heads": 2}
        return dataclasses.replace(
            self,
            kv_heads=2 if self.kv_heads == self.heads else 1,
            vocabulary=512,
            special_id=500,
            **sizes,
        )


LLADA_8B = DecoderShape(
    4096,
    12288,
    32,
    32,
    32,
    126464,
    126336,
    causal=False,
    last_only=False,
    merged=False,
    qkv_bias=False,
)
QWEN_VL_7B = DecoderShape(
    3584, 18944, 28, 28, 4, 152064, 151655, causal=True, last_only=True, merged=True, qkv_bias=True
)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D]; cos and sin [T, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class DecoderLayer(nn.Module):
    groups = (
        ("q", "k", "v"),
        ("o",),
        ("gate", "up"),
        ("down",),
    )  # Linears that read the same tensor

    def __init__(self, shape: DecoderShape, cache: tuple[int, int]):
        super().__init__()
        d, self.shape = shape.hidden // shape.heads, shape
        batch, length = cache
        self.attention_norm, self.mlp_norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * d, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * d, bias=shape.qkv_bias)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)
        # [B, H, length, D]; empty for a pass over whole sequences.
        for name in ("keys", "values"):
            cached = torch.randn(batch, shape.kv_heads, length, d)
            self.register_buffer(name, cached, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        h = self.attention_norm(x)
        q, k, v = (
            linear(h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for linear, heads in (
                (self.q, shape.heads),
                (self.k, shape.kv_heads),
                (self.v, shape.kv_heads),
            )
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        length = self.keys.shape[2]
        if length:
            # In place, as transformers' static cache does; a slice that is assigned to would be a copy of the whole.
            places = torch.arange(length - k.shape[2], length, device=k.device)
            k, v = self.keys.index_copy_(2, places, k), self.values.index_copy_(2, places, v)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=shape.causal and not length, enable_gqa=shape.heads != shape.kv_heads
        )
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Ids [B, T] and image features [number of image tokens, hidden] to logits.

    cache  sequences and positions of the buffer of keys and values; (0, 0): whole sequences, no buffer
    """

    def __init__(self, shape: DecoderShape, cache: tuple[int, int] = (0, 0)):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape, cache) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        # cos and sin of 8192 positions
        d = shape.hidden // shape.heads
        frequencies = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
        angles = torch.outer(torch.arange(8192, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)
        self.cache_length = cache[1]

    def forward(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        if features is not None:
            is_image = (ids == self.shape.special_id).unsqueeze(-1).expand_as(x)
            x = x.masked_scatter(is_image, features)
        first = max(0, self.cache_length - ids.shape[1])
        positions = slice(first, first + ids.shape[1])
        cos, sin = self.cos[positions], self.sin[positions]
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return self.head(x[:, -1:] if self.shape.last_only else x)


def random_decoder(
    shape: DecoderShape, device: torch.device, cache: tuple[int, int] = (0, 0)
) -> Decoder:
    """In bf16, with weights that keep activations at a size of about one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Decoder(shape, cache)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantized_decoder(dense: Decoder, config: QuantConfig) -> nn.Module:
    """The same decoder in W4A4, one transform for each group; embedding, norms, head and cache are shared."""
    model = sharing_tensors(dense)
    for layer in model.layers:  # type: ignore[union-attr]
        for names in DecoderLayer.groups:
            first = getattr(layer, names[0])
            group = GroupTransformModule(
                typed_transform(first.in_features, config, first.weight.device)
            )
            for name in names:
                setattr(layer, name, quantized_linear(getattr(layer, name), group, config))
    return model.eval()


def random_inputs(
    shape: DecoderShape, batch: int, length: int, share: float, device: torch.device
) -> tuple[Tensor, ...]:
    """Ids [batch, length] of which a share, at random places, is of the second type; and their features, if merged."""
    generator = torch.Generator().manual_seed(0)
    total = batch * length
    ids = torch.randint(0, min(shape.special_id, shape.vocabulary), (total,), generator=generator)
    chosen = torch.randperm(total, generator=generator)[: round(share * total)]
    ids[chosen] = shape.special_id
    inputs = [ids.view(batch, length)]
    if shape.merged:
        inputs.append(torch.randn(len(chosen), shape.hidden, generator=generator).bfloat16())
    return tuple(t.to(device) for t in inputs)
