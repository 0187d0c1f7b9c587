"""Who may import whom, read off the source: every part can be understood without those above it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "perceiver_ar"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

BOTTOM = {"errors", "files", "progress", "threads"}
NETWORK = BOTTOM | {"config", "network"}
BELOW_THE_TASKS = NETWORK | {
    "objective",
    "windows",
    "scored_windows",
    "generation",
    "optim",
    "data",
    "lock",
    "run",
    "costs",
    "origin",
}

# Every module, or folder of modules, and what it may import of ours. Modules of one folder may import each other.
MAY_IMPORT = {
    "errors": set[str](),
    "files": {"errors"},
    "progress": set[str](),
    "threads": set[str](),
    "lock": {"errors"},
    "config": BOTTOM,
    "network": BOTTOM | {"config"},
    "objective": NETWORK,
    "windows": BOTTOM | {"config"},
    "scored_windows": BOTTOM,
    "generation": NETWORK | {"windows", "data"},
    "optim": {"errors", "config"},
    "costs": BOTTOM | {"config"},
    "data": BOTTOM | {"config"},
    "run": NETWORK | {"data", "lock"},
    "origin": NETWORK | {"data", "run"},
    "compat": NETWORK | {"objective", "windows", "generation", "data"},
    "tables": BOTTOM,
    "evaluation": BELOW_THE_TASKS | {"tables"},
    "compression": BELOW_THE_TASKS,
    "embeddings": BELOW_THE_TASKS | {"evaluation"},
    "scores": BELOW_THE_TASKS | {"evaluation"},
    "scaling": BELOW_THE_TASKS,
    "plots": BOTTOM | {"config", "evaluation"},
    "onnx": NETWORK | {"generation", "data"},
    "report": BOTTOM | {"run"},
    "card": BOTTOM | {"run", "data"},
    "training": BELOW_THE_TASKS | {"report", "evaluation", "plots", "adapters"},
    "huggingface": BELOW_THE_TASKS,
    "serving": BELOW_THE_TASKS | {"evaluation"},
    "adapters": NETWORK | {"data", "run", "huggingface"},
    "cli": BELOW_THE_TASKS
    | {"compat", "card", "onnx", "compression", "embeddings", "evaluation", "scores", "scaling", "tables", "plots"}
    | {"training", "huggingface", "serving", "adapters"},
    "__main__": {"cli"},
}

# Packages of others that one module of ours keeps to itself; their submodules and old names count as they do.
ONLY_IN = {
    "lightning_fabric": "training",
    "lightning_utilities": "training",
    "transformers": "huggingface data",  # data: neural audio codecs
    "wandb": "training",
    "trackio": "training",
    "matplotlib": "plots",
    "datasets": "data",
    "torchao": "generation",
    "peft": "adapters",
    "constriction": "compression",
    "scipy": "scaling",
    "fastapi": "serving",
    "starlette": "serving",
    "uvicorn": "serving",
    "prometheus_client": "serving",
    "pydantic": "serving",
}
WITHOUT_TORCH = {"errors", "files", "progress", "lock", "config", "costs", "windows", "scored_windows"}


class Import(NamedTuple):
    name: str
    """Dotted and absolute; of `from a import b` both `a.b`, and `a` where `b` is no module of ours."""
    line: int
    lazy: bool
    """Inside a function, under TYPE_CHECKING, or a module's name in a string: not run when the module is imported."""


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """Every import in `source`, the text of `module` (dotted). `known` has the dotted names of all modules of ours."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, node.lineno, lazy)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    package = module.split(".")
                    package = package[: len(package) + is_package - node.level]
                    base = ".".join([*package, base] if base else package)
                for alias in node.names:
                    if base == PACKAGE and alias.name == "__version__":
                        continue
                    full = f"{base}.{alias.name}"
                    yield Import(full if full in known else base, node.lineno, lazy)
            case ast.Constant(value=str(text)) if re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", text):
                yield Import(text.partition(":")[0], node.lineno, True)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, lazy)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def modules_under(root: Path) -> dict[str, Path]:
    """Dotted names of the modules under the package directory `root`, and their files."""
    modules: dict[str, Path] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join((PACKAGE, *parts)).removesuffix(".__init__")] = path
    return modules


def violations(root: Path) -> list[str]:
    """One line for each import under the package directory `root` that the tables above do not allow."""
    modules = modules_under(root)
    found = []
    for module, path in modules.items():
        here = path.relative_to(root.parent).as_posix()
        part = module.split(".")[1] if "." in module else None  # None: the package's own __init__
        if part is not None and part not in MAY_IMPORT:
            found.append(f"{here}: new here; say in MAY_IMPORT of tests/test_layering.py what {part!r} may import")
            continue
        facade = path.name == "__init__.py"  # may offer everything, as long as it loads nothing before it is asked for
        for name, line, lazy in imports(path.read_text(encoding="utf-8"), module, facade, set(modules)):
            first, _, rest = name.partition(".")
            if facade and lazy:
                continue
            if first != PACKAGE:
                if first in ONLY_IN and part not in ONLY_IN[first].split():
                    found.append(f"{here}:{line}: only {ONLY_IN[first].split()[0]} imports {first}")
                if first == "torch" and (part is None or part in WITHOUT_TORCH):
                    found.append(f"{here}:{line}: {part or 'the package itself'} does without torch")
                continue
            target = rest.partition(".")[0]
            if part is None:
                if target not in WITHOUT_TORCH:
                    found.append(f"{here}:{line}: import {name} lazily here, or `import {PACKAGE}` loads all of it")
            elif not target:
                found.append(f"{here}:{line}: import from the module that defines the name, not from {PACKAGE} itself")
            elif target != part and target not in MAY_IMPORT[part]:
                found.append(f"{here}:{line}: {part} may not import {name}")
    return found


def test_imports_go_one_way_only():
    assert violations(SOURCE) == []


def test_no_module_needs_itself():
    """Also within a folder, and also where the import is in a function."""
    modules = modules_under(SOURCE)
    needs = {
        module: {each.name for each in imports(path.read_text(encoding="utf-8"), module, False, set(modules))}
        for module, path in modules.items()
        if path.name != "__init__.py"  # offers what is above it
    }
    list(TopologicalSorter(needs).static_order())  # raises CycleError, with the circle


def test_the_table_has_no_cycle():
    done: set[str] = set()
    while ready := {part for part, below in MAY_IMPORT.items() if part not in done and below <= done}:
        done |= ready
    assert done == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH | {"cli"}))  # help and wrong options are answered at once
def test_importing_it_loads_no_torch(module: str):
    program = f"import sys, {PACKAGE}.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_evaluating_and_generating_load_only_what_they_use():
    """These take longer to import than torch itself."""
    program = f"""if True:
        import sys
        import {PACKAGE}.compat, {PACKAGE}.evaluation, {PACKAGE}.generation, {PACKAGE}.run, {PACKAGE}.training.trouble
        slow = "torch._dynamo torch.distributed.tensor lightning_fabric transformers datasets matplotlib".split()
        sys.exit(str([name for name in slow if name in sys.modules] or ""))
    """
    assert subprocess.run([sys.executable, "-c", program], check=False, stderr=subprocess.PIPE).stderr.strip() == b""


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("files.py", "import perceiver_ar.progress", "files may not import perceiver_ar.progress"),
        ("costs.py", "import torch.nn as nn", "costs does without torch"),
        ("network/model.py", "from perceiver_ar.objective import next_token_loss", "network may not import"),
        (
            "network/model.py",
            "from perceiver_ar import objective as o",
            "network may not import",
        ),
        (
            "network/model.py",
            "from ..objective import next_token_loss",
            "network may not import",
        ),
        (
            "network/model.py",
            "def f():\n    from perceiver_ar import objective",
            "network may not import",
        ),
        (
            "network/model.py",
            "if TYPE_CHECKING:\n    from .. import objective",
            "network may not import",
        ),
        (
            "network/model.py",
            "import_module('perceiver_ar.objective')",
            "network may not import",
        ),
        ("network/model.py", "from perceiver_ar import generate", "import from the module that defines the name"),
        ("network/model.py", "from lightning_fabric import Fabric", "only training imports lightning_fabric"),
        ("data/text.py", "from ..network.model import PerceiverAR", "data may not import perceiver_ar.network.model"),
        ("data/text.py", "def f():\n    import matplotlib.pyplot", "only plots imports matplotlib"),
        ("data/__init__.py", "from .. import network", "data may not import perceiver_ar.network"),
        ("compat/google.py", "from perceiver_ar.training import train", "compat may not import perceiver_ar.training"),
        ("report.py", "import transformers", "only huggingface imports transformers"),
        ("__init__.py", "from perceiver_ar.network.model import PerceiverAR", "lazily"),
        ("__init__.py", "from torch import Tensor", "the package itself does without torch"),
        ("brand_new.py", "", "MAY_IMPORT"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, path: str, source: str, complaint: str):
    tree = tmp_path / PACKAGE
    for name in (*MAY_IMPORT, "data/text", "data/codec", "data/__init__", "compat/__init__", "network/model"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / f"{name}.py").touch()
    (tree / "data.py").unlink()
    (tree / "compat.py").unlink()
    (tree / "network.py").unlink()
    (tree / "network" / "__init__.py").touch()
    assert violations(tree) == []
    (tree / path).write_text(source)
    [line] = violations(tree)
    assert complaint in line
    assert line.startswith(f"{PACKAGE}/{path}:")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "def __getattr__(name):\n    from perceiver_ar.network.model import PerceiverAR"),
        ("__init__.py", "if TYPE_CHECKING:\n    from perceiver_ar.cli import main"),
        ("__init__.py", "WHERE = {'PerceiverAR': 'perceiver_ar.network.model'}"),
        ("compat/__init__.py", "def load():\n    from perceiver_ar.training import train"),
        ("data/text.py", "from . import codec\nfrom .codec import Codec\nfrom ..config import PerceiverARConfig"),
        ("data/__init__.py", "from .text import TextCodec\nfrom ..errors import InputError"),
        ("cli/train.py", "from perceiver_ar import __version__, compat, training"),
        ("network/model.py", "'''See perceiver_ar.objective for the loss.'''\nimport torch"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str):
    (tmp_path / PACKAGE / "data").mkdir(parents=True)
    (tmp_path / PACKAGE / "compat").mkdir()
    (tmp_path / PACKAGE / "network").mkdir()
    (tmp_path / PACKAGE / "cli").mkdir()
    for name in ("compat/__init__", "training", "data/codec", "data/text"):
        (tmp_path / PACKAGE / f"{name}.py").touch()
    (tmp_path / PACKAGE / path).write_text(source)
    assert violations(tmp_path / PACKAGE) == []
