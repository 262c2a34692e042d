"""What is installed, what an import costs, and what it does not touch."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import freeact_fx

ROOT = Path(__file__).parent.parent


def python(code: str, *, cwd: Path | None = None) -> str:
    """Run code in a fresh Python, outside the checkout unless told otherwise; what it printed."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT.anchor)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the sources: setuptools leaves a build folder beside them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("freeact_fx", "passes", "codegen"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = target.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    """The root folders passes and codegen are installed as sub-packages, and nothing stands at the top beside ours."""
    expected = {"freeact_fx/py.typed"}
    for folder, prefix in (
        ("freeact_fx", "freeact_fx"),
        ("passes", "freeact_fx/passes"),
        ("codegen", "freeact_fx/codegen"),
    ):
        files = [file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*.py")]
        expected |= {f"{prefix}/{file.as_posix()}" for file in files}
    assets = [f for f in (ROOT / "freeact_fx/inspection/assets").rglob("*") if f.is_file()]
    expected |= {f.relative_to(ROOT).as_posix() for f in assets}
    tiles = (ROOT / "codegen/tuned").glob("*.json")
    expected |= {f"freeact_fx/{f.relative_to(ROOT).as_posix()}" for f in tiles}
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == expected
    assert {f"freeact_fx/{name}/__init__.py" for name in ("passes", "codegen")} < installed


def test_wheel_declares_backend_licence_and_requirements(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    assert dict(parser["torch_dynamo_backends"]) == {"freeact": "freeact_fx.backend:freeact"}
    assert dict(parser["console_scripts"]) == {"freeact": "freeact_fx.cli:main"}
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
    (metadata,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    lines = wheel.read(metadata).decode().splitlines()
    assert "Requires-Python: >=3.10" in lines
    required = [line for line in lines if line.startswith("Requires-Dist") and "extra" not in line]
    names = {line.split(":")[1].strip().split(">")[0].split(";")[0] for line in required}
    assert names == {"torch", "sympy", "safetensors", "triton"}
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra")}
    assert {"hf", "cli", "test", "bench"} <= extras


def test_wheel_works_where_it_is_unpacked(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The installed layout has real folders where the checkout has a mapping."""
    wheel.extractall(tmp_path)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import freeact_fx, freeact_fx.passes.insert, freeact_fx.codegen.lowering, freeact_fx.backend
        for module in (freeact_fx, freeact_fx.passes, freeact_fx.codegen):
            print(module.__file__)
    """
    for line in python(textwrap.dedent(code)).splitlines():
        assert line.startswith(str(tmp_path / "freeact_fx"))


# ------------------------------------------------------------------ the import


IMPORT = """
import json, sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import freeact_fx
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def test_import_is_fast_and_touches_no_compiler() -> None:
    """Under 0.3 s on top of torch; the best of a few, since the machine may be busy."""
    times: list[float] = []
    while len(times) < 3 or (min(times) > 0.3 and len(times) < 6):
        seconds, new = json.loads(python(IMPORT))
        times.append(seconds)
    assert min(times) < 0.3
    heavy = ("torch._inductor", "torch._dynamo", "triton", "transformers", "numpy", "sympy")
    assert "freeact_fx.reference" in new
    assert not [name for name in new if name.startswith(heavy)]
    assert not [n for n in new if n.startswith(("freeact_fx.passes", "freeact_fx.codegen"))]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, freeact_fx
from tiny_model import MASK, masked_ids, relative, tiny_model
from freeact_fx import QuantConfig, TokenTypes

model, ids = tiny_model(), masked_ids()
config = QuantConfig(token_types=TokenTypes.mask_token(MASK))
with torch.no_grad():
    want = model(ids)
    compiled = torch.compile(model, backend="freeact", options={"compiler": "eager", **config.to_dict()})
    dense = compiled(ids)
    checkpoint = freeact_fx.calibrate(model, [ids], config, progress=False)
    freeact_fx.convert(model, checkpoint)
    with freeact_fx.token_types(config.token_types.from_ids(ids)):
        eager = model(ids)
print(max(relative(y, want) for y in (dense, eager)) < 0.5)
"""


def test_works_without_triton() -> None:
    assert python(WITHOUT_TRITON, cwd=ROOT / "tests") == "True"


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_bare_import_from_the_checkout_is_refused(name: str) -> None:
    """It would load a second copy beside ``freeact_fx.passes`` and register the ops twice."""
    code = f"try: import {name}\nexcept ImportError as error: print(error)"
    assert python(code, cwd=ROOT).startswith(f"import freeact_fx.{name}, not {name}: ")


FIRST_CALL = """
import sys, torch
assert "freeact_fx" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.SiLU(), torch.nn.Linear(48, 48)).eval()
x = torch.randn(4, 48)
compiled = torch.compile(model, backend="freeact", options={"compiler": "eager"})
with torch.no_grad():
    y, want = compiled(x), model(x)
print(0 < float((y - want).norm() / want.norm()) < 0.5)
"""


def test_first_call_may_be_compiled_and_the_package_never_imported() -> None:
    assert python(FIRST_CALL) == "True"


def test_backend_is_listed_once() -> None:
    code = "import torch, freeact_fx; print(torch._dynamo.list_backends().count('freeact'))"
    assert python(code) == "1"


def test_version_is_the_projects() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{freeact_fx.__version__}"' in project


def test_public_names_are_there_and_documented() -> None:
    assert sorted(freeact_fx.__all__) == freeact_fx.__all__
    for name in freeact_fx.__all__:
        assert getattr(freeact_fx, name).__doc__
