"""A run as a directory that transformers load on a machine without this package: the code goes with the weights."""

import ast
from pathlib import Path

from perceiver_ar import __version__
from perceiver_ar.data.codec import Codec, save_codec
from perceiver_ar.files import write_text
from perceiver_ar.huggingface.modeling import PerceiverARForCausalLM
from perceiver_ar.huggingface.tokenizer import codec_tokenizer

MODULE = "modeling_perceiver_ar"
SOURCES = ["errors", "files", "config", "attention", "heads", "streaming", "cache", "windows", "model", "objective",
           "sampling", "generation", "huggingface/modeling"]  # fmt: skip
"""What the network needs, each after those that it imports."""


def export(model: PerceiverARForCausalLM, codec: Codec | None, directory: Path) -> None:
    """Writes model, tokenizer and code into a directory, for `trust_remote_code=True`; it is still a run."""
    name = f"{MODULE}.{type(model).__name__}"
    model.config.auto_map = {"AutoConfig": f"{MODULE}.{type(model.config).__name__}", "AutoModelForCausalLM": name}
    model.save_pretrained(directory)
    write_text(directory / f"{MODULE}.py", flat_source())
    if codec is not None:
        save_codec(codec, directory)
        codec_tokenizer(codec).save_pretrained(directory)


def flat_source() -> str:
    """`SOURCES` as one module: imports of others on top and once, our own left out."""
    root = Path(__file__).parents[1]
    imports: set[str] = set()
    defined: set[str] = set()
    parts: list[str] = []
    for source in SOURCES:
        text = (root / f"{source}.py").read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        for node in tree.body:
            names = _names(node)
            assert not names & defined, f"{source}.py defines {names & defined} again"
            defined |= names - {"_"}
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("perceiver_ar")):
                    imports.add(ast.unparse(node))
                assert node.end_lineno is not None
                for number in range(node.lineno - 1, node.end_lineno):
                    lines[number] = ""
        body = "\n".join(lines).strip()
        parts.append(f"# {source}.py\n\n{body}\n")
    head = f'"""Perceiver AR for Hugging Face transformers in one file, written by perceiver-ar {__version__}."""\n\n'
    return head + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n".join(parts)


def _names(node: ast.stmt) -> set[str]:
    """What a statement of a module defines."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()
