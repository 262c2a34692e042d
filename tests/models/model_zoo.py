"""Small random models of every kind that matters, with inputs whose token types are known.

Hidden size 128, two layers, a few hundred ids. The models are Hugging Face's own code, so their graphs are the real
ones; only the weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

MASK_ID, IMAGE_ID, VIDEO_ID, PAD_ID = 499, 500, 501, 0
VOCABULARY = 512
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    build            makes it, with random weights
    pictures         makes its picture inputs for a number of pictures; None: a text model
    picture_tokens   tokens of one picture
    """

    build: Callable[[], nn.Module]
    pictures: Callable[[int], dict[str, Tensor]] | None = None
    picture_tokens: int = 0


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**_TEXT)
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    return transformers.BertForMaskedLM(transformers.BertConfig(**text))


def _modernbert() -> nn.Module:
    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    config = transformers.ModernBertConfig(
        **text, cls_token_id=1, sep_token_id=2, local_attention=8
    )
    return transformers.ModernBertForMaskedLM(config)


class BidirectionalLlama(nn.Module):
    """A masked-diffusion language model as LLaDA builds it: Llama's layers, every token sees every other."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.LlamaModel(transformers.LlamaConfig(**_TEXT))
        self.head = nn.Linear(128, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.model.embed_tokens(input_ids)
        visible = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = self.model.rotary_emb(x, positions)
        for layer in self.model.layers:
            x = layer(x, attention_mask=visible, position_embeddings=rotary, is_causal=False)
        return self.head(self.model.norm(x))


def _pixels(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 56, 56)}


_VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def _llava() -> nn.Module:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_index=IMAGE_ID,
        )
    )


def _gemma3() -> nn.Module:
    text = transformers.Gemma3TextConfig(
        **_TEXT, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config=transformers.SiglipVisionConfig(**_VISION),
            image_token_index=IMAGE_ID,
            mm_tokens_per_image=4,
        )
    )


def _smolvlm() -> nn.Module:
    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.SmolVLMVisionConfig(**_VISION),
            image_token_id=IMAGE_ID,
            scale_factor=2,
        )
    )


def _smolvlm_pixels(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 1, 3, 56, 56)}


def _internvl() -> nn.Module:
    vision = {**_VISION, "image_size": (56, 56), "patch_size": (14, 14)}
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            text_config=transformers.Qwen2Config(**_TEXT),
            vision_config=transformers.InternVLVisionConfig(**vision),
            image_token_id=IMAGE_ID,
        )
    )


def _qwen25vl() -> nn.Module:
    text = {
        **_TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    }
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config={
                "depth": 2,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_heads": 4,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
                "window_size": 56,
            },
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=502,
            vision_end_token_id=503,
        )
    )


def _qwen25vl_pixels(count: int) -> dict[str, Tensor]:
    # One picture is 4 x 4 patches of 14 x 14 pixels, two frames, three channels; 2 x 2 patches make a token.
    return {
        "pixel_values": torch.randn(16 * count, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
    }


KINDS: dict[str, Kind] = {
    "llama": Kind(_llama),
    "bert": Kind(_bert),
    "modernbert": Kind(_modernbert),
    "bidirectional": Kind(BidirectionalLlama),
    "llava": Kind(_llava, _pixels, 16),
    "gemma3": Kind(_gemma3, _pixels, 4),
    "smolvlm": Kind(_smolvlm, _smolvlm_pixels, 4),
    "internvl": Kind(_internvl, _pixels, 4),
    "qwen2.5-vl": Kind(_qwen25vl, _qwen25vl_pixels, 4),
}
TEXT_MODELS = tuple(name for name, kind in KINDS.items() if kind.pictures is None)
PICTURE_MODELS = tuple(name for name, kind in KINDS.items() if kind.pictures is not None)


def build(name: str) -> nn.Module:
    """A model of a kind, always with the same weights."""
    torch.manual_seed(1)
    model = KINDS[name].build().eval()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # Exact zeros at padding would be blown up by one norm after another: nothing to compare.
            nn.init.normal_(module.weight.data[module.padding_idx], std=0.02)
    return model


def text_ids(batch: int, length: int, *, masked: float = 0.0, seed: int = 0) -> Tensor:
    """Random ids [B, T]; a fraction of them, never the first, is [MASK]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 490, (batch, length), generator=generator)
    ids[torch.rand(batch, length, generator=generator) < masked] = MASK_ID
    return ids


def picture_inputs(
    name: str, *, starts: tuple[int, ...] = (3, 9), length: int = 32, padding: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Inputs with one picture per sequence.

    starts   where the picture's tokens begin in each sequence
    padding  number of left padding tokens of each sequence
    """
    kind = KINDS[name]
    assert kind.pictures is not None
    ids = text_ids(len(starts), length)
    mask = torch.ones_like(ids)
    for row, start in enumerate(starts):
        ids[row, start : start + kind.picture_tokens] = IMAGE_ID
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = PAD_ID, 0
    torch.manual_seed(2)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        **kind.pictures(len(starts)),
    }
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE_ID).long()
    if name == "qwen2.5-vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    return inputs
