"""The documentation: what README and pages show is run, on small files with a small network; links lead somewhere.

The rest of each command is run as it is written.
"""

import gzip
import importlib.util
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FENCE, ROOT, blocks, write_files
from samples import write_band, write_music, write_numbers, write_picture, write_sound

import perceiver_ar
from perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_ar.cli import main
from perceiver_ar.compat import save_krasserm
from perceiver_ar.compat.lucidrains import PerceiverAR as Package

HAS_CODER = importlib.util.find_spec("constriction") is not None
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

# What makes hours into a second.
SMALL = [
    *("--max_steps", "2", "--max_time", "none", "--model.dim", "16", "--model.num_layers", "1"),
    *("--model.num_heads", "1", "--model.context_length", "64", "--model.num_latents", "16"),
    *("--trainer.batch_size", "1", "--trainer.evaluations", "1", "--trainer.evaluation_tokens", "300"),
    *("--trainer.sample_tokens", "2", "--trainer.precision", "32"),
]


def lines(page: str, program: str) -> list[str]:
    return [
        line for language, code in blocks(page) if language == "bash" for line in code.splitlines()
        if line.startswith(f"{program} ")
    ]  # fmt: skip


def shortened(command: str) -> list[str]:
    words = shlex.split(command, comments=True)[1:]
    if words[0] == "train":
        words += SMALL
        if "demo.yaml" in command or "bpe_vocab_size" in command:
            words += ["--data.bpe_vocab_size", "270"]
        if "image.yaml" in command:
            words += ["--data.image_size", "[6,6]"]
    if words[0] == "generate":
        words += ["--max_new_tokens", "2"]
    if "--context_lengths" in words:
        words[words.index("--context_lengths") + 1] = "4,16,64"
    return words


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files that the pages name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for folder in ("books", "logs", "runs"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        text = " ".join(f"It was night {i} in book {number}." for i in range(40))
        (tmp_path / f"books/{number}.txt").write_text(text)
        (tmp_path / f"logs/{number}.log").write_text(text.replace(".", "\n"))
    (tmp_path / "letters").mkdir()
    names = ["austen-1", "austen-2", "keats-1", "keats-2"]
    (tmp_path / "letters/about.csv").write_text(
        "file,author,year\n" + "".join(f"{name}.txt,{name[:-2]},{1812 + 7 * (name[0] == 'k')}\n" for name in names)
    )
    for name in names:
        (tmp_path / f"letters/{name}.txt").write_text(f"My dear, it was night. {name} " * 20)
    (tmp_path / "poems").mkdir()
    for number in range(1, 4):
        (tmp_path / f"poems/{number}.txt").write_text(f"It was night {number}. " * 20)
    (tmp_path / "poems/about.csv").write_text(
        "file,poet,description\n1.txt,keats,a nightingale\n3.txt,poe,the sea in April\n"
    )
    for name in ("new_book.txt", "corpus.txt"):
        (tmp_path / name).write_text("It was a dark and stormy night.\n\n\n\n" * 9)
    with gzip.open(tmp_path / "genome.fa.gz", "wt") as file:
        file.write("".join(f">{number}\n{('ACGTTGCA' + number * 'A') * 60}\n" for number in range(4)))
    (tmp_path / "start.fa").write_text(">start\nACGT\n")
    (tmp_path / "held.bed").write_text("1\n")
    with gzip.open(tmp_path / "more.txt.gz", "wt") as file:
        file.write("It was night, and more. " * 20)
    row = json.dumps({"doc": {"text": "It was night. " * 20}, "id": 1})
    (tmp_path / "stories.jsonl").write_text(f"{row}\n{row.replace('night', 'day')}\n")
    for folder, name, write in (
        ("performances", "Piece{}__Anna.mid", write_music),
        ("songs", "{}.mid", write_band),
        ("pictures", "{}.png", write_picture),
        ("recordings", "{}.wav", write_sound),
        ("arrays", "{}.npy", write_numbers),
    ):
        (tmp_path / folder).mkdir()
        for number in range(4):
            write(tmp_path / folder / name.format(number), number)
    rows = "".join(json.dumps({"text": f"It was night {number}."}) + "\n" for number in range(40))
    write_files(tmp_path / "roneneldan" / "TinyStories", {"train.jsonl": rows.encode()})
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        archive.add(tmp_path / "books", "books")
    write_music(tmp_path / "prelude.mid", 20)
    write_band(tmp_path / "song.mid", 20)
    write_picture(tmp_path / "cat.png", 20)
    small = PerceiverARConfig(vocab_size=256, context_length=128, num_latents=16, dim=16, num_layers=1, num_heads=1)
    PerceiverAR(small).save_pretrained(tmp_path / "my-model")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/tutorial-text.md",
        "docs/tutorial-piano.md",
        "docs/tutorial-long.md",
        "docs/data.md",
        "docs/conditions.md",
        "docs/large-data.md",
        "docs/score.md",
        "docs/embed.md",
        pytest.param("docs/compress.md", marks=pytest.mark.skipif(not HAS_CODER, reason="needs constriction")),
        "docs/modalities.md",
        "docs/huggingface.md",
        "docs/windows.md",
    ],
)
def test_what_a_page_shows_runs(page: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page in ("docs/huggingface.md", "docs/score.md", "docs/embed.md", "docs/compress.md"):
        assert main(shortened("perceiver-ar train books/ --out runs/books")) == 0
        shutil.copytree("runs/books", "runs/other")
    ran = 0
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), {})  # what a reader would paste
            ran += 1
        for command in code.splitlines() if language == "bash" else ():
            if command.startswith("perceiver-ar "):
                assert main(shortened(command)) == 0, f"{command}\n{capsys.readouterr().err}"
                ran += 1
            elif command.startswith("python benchmarks/planted_genome.py "):
                _, script, file = command.split()
                subprocess.run([sys.executable, ROOT / script, file, "0.001"], check=True)
    assert ran > 0


def lucidrains() -> dict[str, Any]:
    net = Package(num_tokens=256, dim=16, depth=1, heads=8, dim_head=64, max_seq_len=4096, cross_attn_seq_len=3072)
    torch.save(net.state_dict(), "model.pt")
    Path("some_file").write_text("It was night. " * 9)
    return {"tokens": torch.randint(256, (1, 4096))}


def krasserm() -> dict[str, Any]:
    small = {"vocab_size": 262, "dim": 16, "num_layers": 1, "num_heads": 2}
    config = PerceiverARConfig.preset("krasserm", context_length=4096, num_latents=512, **small)
    save_krasserm(PerceiverAR(config), "perceiver-ar-clm")
    return {"tokens": torch.randint(262, (1, 4096)), "pad_mask": torch.arange(4096)[None] < 9}


def google() -> dict[str, Any]:
    """Recorded weights, made wide enough for 16 heads."""
    params = {}
    with np.load(ROOT / "tests/golden/checkpoints/google/params.npz") as recorded:
        for name, array in recorded.items():
            params[name] = np.resize(array, [4 * n if n in (8, 32) else n for n in array.shape])
    np.savez("params.npz", allow_pickle=False, **params)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, array in params.items():
        module, _, weight = name.rpartition("/")
        modules.setdefault(module, {})[weight] = array
    Path("checkpoint.dill").write_bytes(pickle.dumps({"params": modules}))
    return {}


@pytest.mark.parametrize(
    ("page", "prepare"),
    [("from-perceiver-ar-pytorch", lucidrains), ("from-perceiver-io", krasserm), ("from-google-research", google)],
)
def test_what_a_page_on_another_implementation_shows_runs(
    page: str, prepare: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = prepare()
    found = list(blocks(f"docs/{page}.md"))
    assert found
    for language, code in found:
        if language == "python":
            exec(compile(code, page, "exec"), names)  # what a reader would paste
            assert isinstance(names["model"], PerceiverAR)
        else:
            for command in code.splitlines():
                assert main(shlex.split(command)[1:]) == 0, command


def test_the_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in lines("README.md", "make")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in link or (page.parent / link).exists(), link


def test_every_extra_that_a_page_names_exists() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(settings["project"]["optional-dependencies"])
    named = {extra for page in PAGES for extra in re.findall(r"`\[([a-z]\w*)\]`", page.read_text(encoding="utf-8"))}
    assert {"midi", "onnx"} <= named <= extras
    listed = re.search(r"also (.*?),\s+or `all`", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) <= extras


def test_every_page_is_in_the_navigation_once() -> None:
    named = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named) == [page.name for page in PAGES if page.parent == ROOT / "docs"]


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in perceiver_ar.__all__:
        assert f"::: perceiver_ar.{name}\n" in page, name


@pytest.mark.parametrize("page", ["settings.md", "commands.md"])
def test_the_reference_is_what_the_code_says(page: str) -> None:
    made = make_reference().PAGES[page]()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made, "run python docs/make_reference.py"


def make_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_are_shown_with_their_bounds() -> None:
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    for row in (
        "| `model.dim` | `512` | whole number, at least 1 |",
        "| `model.prefix_dropout` | `0.0` | number, in [0, 1) |",
        "| `optim.schedule` | `wsd` | `wsd`, `cosine`, `constant` |",
        "| `data.palette_size` | `256` | whole number, at least 1, at most 256 |",
    ):
        assert row in page


class Assets(HTMLParser):
    """Addresses that a page fetches when it is opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
        self.found += [value for name, value in attrs if names.get(tag) == name and value]


def test_the_site_builds_without_a_word_and_fetches_nothing(tmp_path: Path) -> None:
    """Also without a network: what cannot be reached would be in the log."""
    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    unexpected = re.compile(r"^(?!Build started|No issues found|Build finished).+", flags=re.MULTILINE)
    assert not unexpected.search(log), log
    html = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert len(html) > len(PAGES) - 2
    for path, text in html.items():
        assert not [address for address in Assets(text).found if re.match(r"(\w+:)?//", address)], path
    reference = html[tmp_path / "site/api/index.html"]
    for name in perceiver_ar.__all__:
        assert f'id="perceiver_ar.{name}"' in reference
