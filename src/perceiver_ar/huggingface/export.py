"""A run as a directory that transformers load on a machine without this package: the code goes with the weights."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from perceiver_ar import __version__
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.files import write_text
from perceiver_ar.huggingface.modeling import PerceiverARForCausalLM
from perceiver_ar.huggingface.tokenizer import codec_tokenizer

MODULE = "modeling_perceiver_ar"
SOURCES = [
    *("errors", "files", "config/checks", "config/presets", "config/network"),
    *(f"network/{name}" for name in ("kernels", "autocast", "activations", "attention", "heads", "inputs")),
    *(f"network/{name}" for name in ("streaming", "prefix", "init", "weights", "model")),
    *("objective", "windows"),
    *(f"generation/{name}" for name in ("cache", "sampling", "rows", "compiled", "decoder", "main")),
    *(f"huggingface/{name}" for name in ("configuration", "caching", "hub", "modeling")),
]
"""The model's modules, each after those that it imports."""


def export(model: PerceiverARForCausalLM, codec: Codec | None, directory: Path) -> None:
    """Writes model, tokenizer and code into a directory, for `trust_remote_code=True`; it is still a run."""
    model.save_pretrained(directory)
    parts = {"AutoConfig": type(model.config).__name__, "AutoModelForCausalLM": type(model).__name__}
    settings = model.config.to_diff_dict() | {"auto_map": {auto: f"{MODULE}.{name}" for auto, name in parts.items()}}
    write_text(directory / "config.json", json.dumps(settings, indent=2) + "\n")
    write_text(directory / f"{MODULE}.py", flat_source(set(parts.values())))
    if codec is not None:
        save_codec(codec, directory)
        codec_tokenizer(codec).save_pretrained(directory)


class _Statement(NamedTuple):
    text: str
    """With the comments above it, and the docstring below."""
    defines: set[str]
    uses: set[str]


def flat_source(wanted: set[str]) -> str:
    """`SOURCES` as one module with the statements that the names in `wanted` need, and imports once, on top."""
    root = Path(__file__).parents[1]
    imports: dict[str, set[str]] = {}
    sources = {name: list(_statements((root / f"{name}.py").read_text(encoding="utf-8"), imports)) for name in SOURCES}
    statements = [statement for source in sources.values() for statement in source]
    names = [name for statement in statements for name in statement.defines]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{twice} would collide in a flat file: rename one of each"

    needed: set[str] = set()
    more = wanted.union(*(statement.uses for statement in statements if not statement.defines))
    while more - needed:
        needed |= more
        more = needed.union(*(statement.uses for statement in statements if statement.defines & needed))
    head = [f'"""Perceiver AR for Hugging Face transformers, put together by perceiver-ar {__version__}."""', ""]
    for module, aliases in sorted(imports.items()):
        used = sorted(alias for alias in aliases if alias.split(" as ")[-1].split(".")[0] in needed)
        if module == "":
            head += [f"import {alias}" for alias in used]
        elif used:
            head.append(f"from {module} import {', '.join(used)}")
    parts = ["\n".join(head)]
    for name, source in sources.items():
        kept = [statement.text for statement in source if not statement.defines or statement.defines & needed]
        parts += [f"# {'-' * 8} {name}.py", *kept] if kept else []
    return "\n\n\n".join(parts) + "\n"


def _statements(text: str, imports: dict[str, set[str]]) -> Iterator[_Statement]:
    """The statements of a module without its docstring and imports; adds imports of other packages to `imports`."""
    lines, nodes = text.splitlines(), ast.parse(text).body
    end = nodes[0].end_lineno or 0
    for node, following in zip(nodes[1:], [*nodes[2:], None], strict=True):
        start, end = end, node.end_lineno or 0
        match node:
            case ast.Import():
                imports.setdefault("", set()).update(ast.unparse(alias) for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                if module.partition(".")[0] != "perceiver_ar":
                    imports.setdefault(module, set()).update(ast.unparse(alias) for alias in node.names)
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring, which went with the statement that it is about
            case _:
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    end = following.end_lineno or 0
                uses = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                yield _Statement("\n".join(lines[start:end]).strip(), _defined(node), uses)


def _defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name} - {"_"}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()
