"""The report shows a run on one page that needs no other file and no network."""

import base64
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from perceiver_ar import Run
from perceiver_ar.report import facts, write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SUMMARY = {
    "bits_per_byte": 1.6612, "bits_per_token": 1.6612, "gzip_bits_per_byte": 1.842, "xz_bits_per_byte": 1.609,
    "steps": 848, "tokens_seen": 868_352, "skipped_steps": 0, "train_seconds": 180.2, "parameters": 4_070_000,
}  # fmt: skip
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Its tags and texts; complains about tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "my <run>")
    for folder in (run.samples, run.plots):
        folder.mkdir(parents=True)
    recipe = {"paths": ["<script>alert(1)</script>"], "model": {"context_length": 1024, "num_latents": 128}}
    run.recipe_file.write_text(yaml.safe_dump(recipe))
    for name in ("loss.png", "context.png"):
        (run.plots / name).write_bytes(PIXEL)
    (run.samples / "step-000400.txt").write_text("early words")
    (run.samples / "step-by-step.txt").write_text("notes of the user")
    (run.samples / "step-000848.txt").write_text("if a < b & c: <b>ü€</b>")
    return run


def page(run: Run) -> Page:
    write_report(run, SUMMARY)
    return Page((run.path / "report.html").read_text(encoding="utf-8"))


def test_it_is_self_contained(run: Run) -> None:
    links = [value or "" for _, attrs in page(run).tags for name, value in attrs.items() if name in ("src", "href")]
    assert len(links) == 3 and all(link.startswith("data:") for link in links)
    text = (run.path / "report.html").read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text


@pytest.mark.parametrize(
    ("measured", "first"),
    [
        ({}, "bits per byte"),
        ({"bits_per_byte": None, "bits_per_dimension": 2.5}, "bits per dimension"),
        ({"bits_per_byte": None, "nats_per_note": 7.5}, "nats per note"),
        ({"bits_per_byte": None}, "bits per token"),
    ],
)
def test_the_first_number_is_in_the_unit_that_others_use(measured: dict[str, float | None], first: str) -> None:
    assert next(facts({**SUMMARY, **measured}))[0] == f"{first}, held out"


def test_what_counts_comes_first_and_everything_is_there(run: Run) -> None:
    text = page(run).text
    order = ["1.661", "1.842", "gzip", "848", "How it learned", "What more context brings",
             "What it writes after step 848", "What it writes after step 400", "Settings", "num_latents"]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "3 min 00 s" in text and "skipped" not in text.split("Measurements")[0]


def test_the_last_sample_is_that_of_the_highest_step(run: Run) -> None:
    (run.samples / "step-1000000.txt").write_text("the last words")
    text = page(run).text
    assert text.index("after step 1,000,000") < text.index("after step 848")


def test_nothing_from_files_is_taken_for_markup(run: Run) -> None:
    shown = page(run)
    assert "if a < b & c: <b>ü€</b>" in shown.text and "<script>alert(1)</script>" in shown.text
    assert not {"script", "run"} & {tag for tag, _ in shown.tags}


def test_pictures_and_sounds_are_shown_as_such(run: Run) -> None:
    (run.samples / "step-000848-a.png").write_bytes(PIXEL)
    (run.samples / "step-000848-b.wav").write_bytes(b"RIFF")
    (run.samples / "step-000848-c.mid").write_bytes(b"MThd")
    shown = page(run)
    assert [attrs["alt"] for tag, attrs in shown.tags if tag == "img"][-1] == "step-000848-a.png"
    assert [tag for tag, _ in shown.tags].count("audio") == 1
    assert "step-000848-c.mid" in shown.text


def test_a_run_without_held_out_text_samples_and_pictures_has_one_too(run: Run) -> None:
    shutil.rmtree(run.samples)
    shutil.rmtree(run.plots)
    summary = {"steps": 5, "tokens_seen": 10, "train_seconds": 1.2, "parameters": 3, "skipped_steps": 2}
    write_report(run, summary)
    text = Page((run.path / "report.html").read_text()).text
    assert "of them skipped" in text and "bits per" not in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_without_network_has_nothing_to_complain_about(run: Run, tmp_path: Path) -> None:
    write_report(run, SUMMARY)
    url = (run.path / "report.html").resolve().as_uri()
    result = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
         f"--screenshot={tmp_path / 'page.png'}", url],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (tmp_path / "page.png").stat().st_size > 5000
    assert "CONSOLE" not in result.stderr
