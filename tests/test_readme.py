"""What the README shows is run: its Python as it stands, its commands on a small corpus with a small network."""

import re
import shlex
from pathlib import Path

import pytest
from test_every_modality import write_music, write_numbers, write_picture, write_sound

from perceiver_ar.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes the README's hours into seconds; the rest of each command is run as it is written.
SMALL = [
    *("--max_steps", "6", "--model.dim", "32", "--model.num_layers", "1", "--model.num_heads", "1"),
    *("--model.context_length", "1024", "--model.num_latents", "32", "--trainer.batch_size", "1"),
    *("--trainer.evaluations", "1", "--trainer.sample_tokens", "5"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})  # what a reader would paste


def test_the_commands_in_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for name in ("one", "two", "three"):
        text = " ".join(f"It was night {i} in book {name}." for i in range(200))
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "first.txt").write_text("Dear reader, it was night. " * 50)
    (tmp_path / "new_book.txt").write_text("It was a dark and stormy night. " * 50)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for folder, name, write in (
        ("performances", "Piece{}__Anna.mid", write_music),
        ("pictures", "{}.png", write_picture),
        ("recordings", "{}.wav", write_sound),
        ("arrays", "{}.npy", write_numbers),
    ):
        (tmp_path / folder).mkdir()
        for number in range(12):
            write(tmp_path / folder / name.format(number), number)
    write_music(tmp_path / "prelude.mid", 20)
    write_picture(tmp_path / "cat.png", 20)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("perceiver-ar ")]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        if "--max_time" in words:
            at = words.index("--max_time")
            words[at : at + 2] = SMALL
        elif "recipes/" in command:
            words += SMALL
        if words[0] == "generate":
            words += ["--max_new_tokens", "3"]
        assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    assert Path("runs/books/plots/context.png").stat().st_size > 0
    assert "bits per byte" in capsys.readouterr().out


def test_the_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
