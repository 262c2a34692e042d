"""How long does calibrating the 135M masked-diffusion model take on a CPU, and what does the quick setting lose?

    python benchmarks/calibration_time.py                 appends to benchmarks/results/calibration_time.jsonl
    python benchmarks/calibration_time.py --check         exit status 1 if a setting takes longer than it may

The default and `QuantConfig.quick()`, as `benchmarks/demo_dllm.py` uses them, each on its number of windows of 512
tokens: wall and processor time of `freeact_fx.calibrate`, peak memory of the process, and NLL and accuracy of masked
tokens at ratio 0.3 of WikiText-2's and GSM8K's test splits. Each setting runs in a process of its own, so that peaks
and first compilations are its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from calibrated import DLLM_CONFIG
from evaluation import dllm_calibration_batches, score_masked_tokens, text_windows
from measure import RESULTS, append_result, peak_memory_bytes
from presentation import table
from small_models import CACHE, load_masked_diffusion

import freeact_fx

LENGTH = 512
# Name: configuration, windows, seconds that it may take on 2 cores.
SETTINGS = {
    "default": (DLLM_CONFIG, 32, 600),
    "quick": (DLLM_CONFIG.quick(), 16, 180),
}


def measure(name: str, cache: Path, num_scored: int) -> dict[str, Any]:
    config, num_windows, _ = SETTINGS[name]
    model = load_masked_diffusion(cache)
    batches = dllm_calibration_batches(num_windows, LENGTH)
    wall, processor = time.perf_counter(), time.process_time()
    checkpoint = freeact_fx.calibrate(model, batches, config)
    facts: dict[str, Any] = {
        "setting": name,
        "num_windows": num_windows,
        "seconds": round(time.perf_counter() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],  # others on this machine
        "peak_bytes": peak_memory_bytes(),
        "checkpoint_bytes": checkpoint.num_bytes,
        "config": config.to_dict(),
    }
    if num_scored:
        freeact_fx.convert(model, checkpoint)
        # Without Inductor: another half a minute to compile, the same codes.
        compiled = torch.compile(
            model, backend="freeact", dynamic=False, options={"compiler": "eager"}
        )
        scores = {
            text: score_masked_tokens(
                compiled, text_windows("evals", text, num_scored, LENGTH), 0.3, text
            )
            for text in ("wiki", "gsm")
        }
        facts["nll"] = {text: round(s.nll, 4) for text, s in scores.items()}
        facts["accuracy"] = {text: round(s.accuracy, 4) for text, s in scores.items()}
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--cache", type=Path, default=CACHE, help="of the base model")
    add("--windows", type=int, default=12, help="of each text, to score; 0: do not")
    add("--out", type=Path, default=RESULTS / "calibration_time.jsonl")
    add("--check", action="store_true", help="compare with what a setting may take on 2 cores")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        facts = measure(args.settings[0], args.cache, args.windows)
        args.measure.write_text(json.dumps(facts))
        return 0
    measured = []
    for name in args.settings:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "facts.json"
            words = [name, "--measure", file, "--cache", args.cache, "--windows", args.windows]
            command = [sys.executable, __file__, "--settings", *map(str, words)]
            subprocess.run(command, check=True)
            measured.append(json.loads(file.read_text()))
        append_result(args.out, **measured[-1])
    columns = ("setting", "num_windows", "seconds", "processor_seconds", "load_average", "nll")
    print(table([list(columns), *([str(m.get(c, "")) for c in columns] for m in measured)]))
    late = [m["setting"] for m in measured if m["seconds"] > SETTINGS[m["setting"]][2]]
    if args.check and late:
        print(f"slower than they may be on 2 cores: {', '.join(late)}", file=sys.stderr)
    return int(args.check and bool(late))


if __name__ == "__main__":
    sys.exit(main())
