"""A masked-diffusion language model of two blocks, small enough to read and to run in milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, MASK, WIDTH, HIDDEN = 64, 63, 48, 96
# In model order; each line is a group: the Linears that read the same activation.
GROUPS = [
    (f"blocks.{i}.{a}",) if isinstance(a, str) else tuple(f"blocks.{i}.{b}" for b in a)
    for i in range(2)
    for a in (("q", "k", "v"), "o", ("gate", "up"), "down")
]
LINEARS = [name for group in GROUPS for name in group]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class TinyModel(nn.Module):
    """Ids [B, T] to logits [B, T, V]; the head is left in full precision by default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def tiny_model() -> TinyModel:
    """In eval mode, the same one each time."""
    torch.manual_seed(0)
    return TinyModel().eval()


def masked_ids(batch: int = 2, length: int = 16, *, seed: int = 0) -> Tensor:
    """Random ids, about a third of them [MASK]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MASK, (batch, length), generator=generator)
    return torch.where(torch.rand(batch, length, generator=generator) < 0.3, MASK, ids)


def relative(got: Tensor, want: Tensor) -> float:
    """Relative distance of two tensors."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def tiny_llama() -> nn.Module:
    """A Hugging Face model as small, causal; the same one each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()
