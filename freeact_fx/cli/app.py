"""The five commands: their options, and what they print. What they do is done by the functions they call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from freeact_fx.errors import ConfigError

from .console import Commands, notes, output, print_group_times, print_table, say, working

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Optional[...]: typer reads these at run time, on Python 3.10 too.
_MODEL_HELP = "Hugging Face model id, a local folder, or a folder that `freeact convert` wrote."
Model = Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=False)]
CheckpointFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder that `freeact calibrate` wrote.", show_default="data-free"),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="A field of QuantConfig; may be given several times."
    ),
]
MaskTokenId = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="The [MASK] id of a masked-diffusion model: its tokens are a type."),
]
Types = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--token-types",
        help="config, auto, single, mask:ID, image:ID, explicit:NAME,NAME, or JSON.",
        show_default="config: the ids that the model's config declares",
    ),
]
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="float32, bfloat16 or float16.", show_default="as stored"),
]
Device = Annotated[str, typer.Option(help="Where the model is put.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Sentence = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--text", help="Text of the call.", show_default="random ids"),
]
Tokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Tokens of each sequence.", show_default="those of the text, or 32"),
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences of the call.")]
Picture = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Picture for a model that takes them.", show_default="random pixels"),
]
InputsFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--inputs", help="Keyword arguments of the call instead, as torch.save wrote them."
    ),
]
JsonFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", help="Write the result as JSON; - prints it and nothing else."),
]


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        say(f"freeact_fx {importlib.metadata.version('freeact-fx')}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """4-bit activations for diffusion and multimodal language models.

    Exit codes: 0 done; 1 done, and what was asked about is so (--strict, --diff, doctor's limits); 2 error.
    """


# ------------------------------------------------------------------ explain


@app.command()
def explain(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help=_MODEL_HELP, show_default=False),
    ] = None,
    checkpoint: CheckpointFolder = None,
    no_weights: Annotated[
        bool,
        typer.Option("--no-weights", help="Build the model from its config.json; needs no memory."),
    ] = False,
    layers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            help="With --no-weights: cut the model to so many layers.",
            show_default="all; 2 for a model that takes pictures",
        ),
    ] = None,
    text: Sentence = None,
    tokens: Tokens = None,
    batch: Batch = 1,
    image: Picture = None,
    inputs: InputsFile = None,
    mask_token_id: MaskTokenId = None,
    token_types: Types = None,
    set_: Settings = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    time: Annotated[
        bool, typer.Option("--time", help="Time each kind of group, dense and quantised.")
    ] = False,
    activations: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="PATTERN",
            help="Record activations per type of these Linears' groups, for --html and --json.",
        ),
    ] = None,
    pattern: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--filter", help="Show only Linears whose name matches, such as '*.q_proj'."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with 1 if a Linear is left alone that was not skipped, or lost its types.",
        ),
    ] = False,
    json_file: JsonFile = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the report as one self-contained HTML file."),
    ] = None,
    diff: Annotated[
        Optional[tuple[Path, Path]],  # noqa: UP045
        typer.Option(
            help="Instead: compare two reports (JSON) or checkpoints (folders); exit with 1 if they differ."
        ),
    ] = None,
) -> None:
    """What happens to every Linear of a model, and why. Nothing is changed."""
    if diff is not None:
        if model is not None:
            raise ConfigError("--diff compares two files or folders; leave MODEL out.")
        _diff(diff[0], diff[1], pattern, json_file)
        return
    if model is None:
        raise ConfigError("MODEL is missing. Name one, or compare two reports with --diff A B.")
    from .inspect import explained, problems_of, without_others

    found, timings = explained(
        _source(model, dtype, device, trust_remote_code),
        _quantisation(checkpoint, set_, mask_token_id, token_types),
        weights=not no_weights,
        num_layers=layers,
        inputs=_wanted(text, tokens, batch, image, inputs),
        code=html is not None,
        activations=activations or (),
        timed=time,
    )
    shown = found if pattern is None else without_others(found, pattern)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        found.to_html(html)
    if not _write_json(json_file, found.to_dict()):
        console = output()
        console.print(
            shown if console.is_terminal else str(shown), soft_wrap=not console.is_terminal
        )
        if pattern is not None:
            say(f"shown: {len(shown.linears)} of {len(found.linears)} Linears, --filter {pattern}")
        if timings:
            print_group_times(timings)
        for path in (p for p in (html, json_file) if p is not None):
            say(f"written: {path}")
    if strict and (problems := problems_of(found)):
        for name, reason in problems:
            notes().print(f"strict: {name}: {reason}")
        notes().print(f"strict: Linears that are not as asked for: {len(problems)}")
        raise typer.Exit(1)


def _diff(before: Path, after: Path, pattern: str | None, json_file: Path | None) -> None:
    from freeact_fx.report_diff import diff, read_side

    from .inspect import change_rows, is_shown

    found = diff(read_side(before), read_side(after))
    changes = [change for change in found.changes if is_shown(change.linear, pattern)]
    if not _write_json(json_file, found.to_dict()):
        if changes:
            print_table(("Linear", "what", str(before), str(after)), change_rows(changes))
        linears = len({change.linear for change in changes})
        say(f"{linears} Linears differ, {found.num_same} are the same")
    if changes:
        raise typer.Exit(1)


# ------------------------------------------------------------------ calibrate


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.", show_default=False)],
    text_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help='Text, or .jsonl with a "text" (and an "image": a file beside it) in each line.'
        ),
    ] = None,
    batches: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Instead: a list of model inputs that torch.save wrote."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each window of text.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = 8,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Windows (or pictures) to use at most.", show_default="all"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A shorter calibration: QuantConfig.quick(), under any --set."
        ),
    ] = False,
    mask_token_id: MaskTokenId = None,
    token_types: Types = None,
    set_: Settings = None,
    max_bytes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Bound on the statistics held at a time, such as 8GB.",
            show_default="half of what is free",
        ),
    ] = None,
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep fitted groups in this folder, and go on there after a kill."),
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar in a terminal.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Run a model over texts or pictures and fit a transform to every group of Linears."""
    from .prepare import calibrated

    found = calibrated(
        _source(model, dtype, device, trust_remote_code),
        _quantisation(None, set_, mask_token_id, token_types),
        out,
        text_file=text_file,
        batches_file=batches,
        num_tokens=tokens,
        batch=batch,
        num_windows=windows,
        quick=quick,
        max_bytes=max_bytes,
        resume=resume,
        progress=progress and notes().is_terminal,
    )
    if not _write_json(json_file, found.to_dict()):
        print_table(("plan", "groups", "Linears", *found.type_names), found.rows())
        for line in found.notes():
            say(line)
        say(f"written: {out}")


# ------------------------------------------------------------------ convert


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the converted model.", show_default=False)],
    checkpoint: CheckpointFolder = None,
    mask_token_id: MaskTokenId = None,
    token_types: Types = None,
    set_: Settings = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_file: JsonFile = None,
) -> None:
    """Write a model with packed 4-bit weights into a folder of its own."""
    from .prepare import converted

    found = converted(
        _source(model, dtype, "cpu", trust_remote_code),
        _quantisation(checkpoint, set_, mask_token_id, token_types),
        out,
    )
    if not _write_json(json_file, found.to_dict()):
        for line in found.lines():
            say(line)
        say(f"written: {out} (load it with freeact_fx.load_converted)")


# ------------------------------------------------------------------ bench


@app.command()
def bench(
    model: Model,
    checkpoint: CheckpointFolder = None,
    dense: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The dense model, where MODEL is a converted one."),
    ] = None,
    whole: Annotated[bool, typer.Option("--model/--no-model", help="Time the whole model.")] = True,
    groups: Annotated[bool, typer.Option(help="Time each kind of group by itself.")] = True,
    runs: Annotated[
        int, typer.Option(min=2, help="Rounds; the median and quartiles are shown.")
    ] = 15,
    text: Sentence = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, help="Tokens of each sequence.", show_default="those of the text, or 256"
        ),
    ] = None,
    batch: Batch = 1,
    image: Picture = None,
    inputs: InputsFile = None,
    mask_token_id: MaskTokenId = None,
    token_types: Types = None,
    set_: Settings = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    json_file: JsonFile = None,
) -> None:
    """Compiled dense beside compiled freeact on this machine: the whole model, and each kind of group."""
    from .bench import benched

    if text is None and tokens is None:
        tokens = 256
    found = benched(
        _source(model, dtype, device, trust_remote_code),
        _quantisation(checkpoint, set_, mask_token_id, token_types),
        dense=None if dense is None else _source(dense, dtype, device, trust_remote_code),
        inputs=_wanted(text, tokens, batch, image, inputs),
        whole=whole,
        groups=groups,
        runs=runs,
    )
    if _write_json(json_file, found.to_dict()):
        return
    say(found.title)
    if found.model:
        print_table(("model", "median (quartiles)", "tokens/s", "speed"), found.model_rows())
        for line in found.agreement_lines():
            say(line)
    if found.groups:
        print_group_times(found.groups)


# ------------------------------------------------------------------ doctor


@app.command()
def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what compiles and takes times.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """What this machine can run, and which speed-up to expect.

    Exit code 0: all is well; 1: it works with limits; 2: it does not work.
    """
    from freeact_fx.doctor import diagnose

    with working("examining") as show:
        found = diagnose(quick=quick, on_section=lambda name: show(f"examining: {name}"))
    if not _write_json(json_file, found.to_dict()):
        console = output()
        section = ""
        styles = {"ok": "green", "limit": "yellow", "failed": "bold red"}
        for check in found.checks:
            if check.section != section:
                section = check.section
                say(section, "bold")
            console.print(f"  [{styles[check.status]}]{check.status:6}[/]  ", end="")
            say(f"{check.name}: {check.value}")
            if check.way_out:
                say(f"          -> {check.way_out}")
        say(found.verdict, styles["ok" if not found.exit_code else "limit"])
    raise typer.Exit(found.exit_code)


# ------------------------------------------------------------------ shared


def _source(model: str, dtype: str | None, device: str, trust_remote_code: bool) -> Any:
    from .models import Source

    return Source(model, dtype, device, trust_remote_code)


def _quantisation(
    checkpoint: Path | None,
    settings: list[str] | None,
    mask_token_id: int | None,
    token_types: str | None,
) -> Any:
    from .models import Quantisation

    return Quantisation(checkpoint, settings or [], mask_token_id, token_types)


def _wanted(
    text: str | None, tokens: int | None, batch: int, image: Path | None, file: Path | None
) -> Any:
    from .inspect import WantedInputs

    return WantedInputs(text, tokens, batch, image, file)


def _write_json(file: Path | None, content: dict[str, Any]) -> bool:
    """Write the result where it was asked for; True if that was standard output, which then has nothing else."""
    if file is None:
        return False
    text = json.dumps(content, indent=1)
    if str(file) == "-":
        typer.echo(text)
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
    return False
