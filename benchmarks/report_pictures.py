"""The pictures of the report in the docs: the HTML page and the terminal table, from a real model.

    python benchmarks/report_pictures.py [--checkpoint FOLDER] [--out docs/pictures]

Shows the demo's masked-diffusion model with its calibrated checkpoint (made in minutes if it is not in the cache);
where the model's weights are not in the cache, a decoder of LLaDA-8B's shapes without any. Needs Chromium
(``apt-get install chromium``) and ``pip install playwright``; looks best with the fonts Inter and JetBrains Mono.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme

import freeact_fx
from freeact_fx import Checkpoint, Report, TokenTypes

FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
WIDTH, HEIGHT, SCALE = 1360, 940, 1.5
MASK_TOKEN_8B = 126336
THEME = TerminalTheme(
    (24, 29, 34),
    (230, 234, 238),
    [
        (24, 29, 34),
        (240, 113, 120),
        (47, 191, 148),
        (240, 180, 41),
        (74, 163, 218),
        (217, 138, 184),
        (86, 180, 190),
        (230, 234, 238),
    ],
    [
        (125, 135, 146),
        (255, 150, 150),
        (90, 215, 175),
        (255, 205, 100),
        (121, 184, 243),
        (235, 170, 205),
        (130, 205, 215),
        (255, 255, 255),
    ],
)
TERMINAL = """<!doctype html><style>
body {{ margin: 0; background: {background}; }}
#window {{ display: inline-block; background: {background}; color: {foreground}; padding: 22px 26px; }}
pre {{ margin: 0; font: 13px/1.45 "JetBrains Mono", ui-monospace, monospace; font-variant-ligatures: none; }}
{stylesheet}</style><div id="window"><pre><code style="font: inherit">{code}</code></pre></div>"""


def demo_report(checkpoint: Path | None) -> Report:
    """The demo's model, calibrated, with the activations of its first and its middle layer."""
    from calibrated import dllm_checkpoint
    from evaluation import dllm_calibration_batches
    from small_models import load_masked_diffusion

    model = load_masked_diffusion()
    found = dllm_checkpoint(model) if checkpoint is None else Checkpoint.load(checkpoint)
    layers = ("*layers.0.*", "*layers.15.*")
    batch = dllm_calibration_batches(2, seed=1)[0]
    options = {"checkpoint": found}
    return freeact_fx.explain(model, **batch, options=options, code=True, activations=layers)


def shapes_report() -> Report:
    """Data-free: 225 Linears, no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=126464,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.zeros(1, 128, dtype=torch.long)
    options = {"token_types": TokenTypes.mask_token(MASK_TOKEN_8B)}
    return freeact_fx.explain(model, input_ids=ids, options=options, code=True)


def photograph(place: Any, file: Path, **settings: Any) -> None:
    """A screenshot of a page or an element, with few colours: a third of the bytes, and no eye sees it."""
    shot = Image.open(io.BytesIO(place.screenshot(**settings)))
    shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB, {shot.width} x {shot.height}")


def report_pictures(browser: Browser, report: Report, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "report.html"
        report.to_html(page_file)
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=SCALE,
            color_scheme="light",
            reduced_motion="reduce",
        )
        page.goto(page_file.as_uri())
        choose(page, [r.name for r in report.quantized if ".0." in r.name][-1])
        page.evaluate("scrollTo(0, 0)")
        photograph(page, out / "report.png")
        page.locator("#errors").scroll_into_view_if_needed()
        if page.locator("#errors .chart svg").count():
            photograph(page.locator("#errors"), out / "report-errors.png")
        page.locator("#activations").scroll_into_view_if_needed()
        if page.locator("#activations .chart").count():
            # The middle layer says more than the first, whose masked tokens are all alike.
            page.locator("#activations select").select_option(index=4)
            page.locator("#activations .chart svg").wait_for()
            photograph(page.locator("#activations"), out / "report-activations.png")
        page.locator("#code").scroll_into_view_if_needed()
        page.locator("#pane-after").wait_for()
        page.emulate_media(color_scheme="dark")
        photograph(page.locator("#graphs"), out / "report-code.png")


def choose(page: Page, name: str) -> None:
    page.fill("#search", name)
    page.keyboard.press("Enter")
    page.fill("#search", "")
    page.evaluate("document.activeElement.blur()")


def terminal_picture(browser: Browser, report: Report, out: Path) -> None:
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    console.print(report)
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
    page.set_content(console.export_html(theme=THEME, code_format=TERMINAL))
    photograph(page.locator("#window"), out / "terminal.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, help="of the demo's model; else that of the cache"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    from small_models import CACHE, SMOLLM2

    is_there = (CACHE / SMOLLM2.folder_name / "model.safetensors").exists()
    report = demo_report(args.checkpoint) if is_there else shapes_report()
    args.out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[f"--{flag}" for flag in FLAGS.split()]
        )
        report_pictures(browser, report, args.out)
        terminal_picture(browser, report, args.out)


if __name__ == "__main__":
    main()
