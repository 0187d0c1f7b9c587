"""The page in a real browser: what is typed goes on, nothing is fetched from elsewhere, nothing fails."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import randomize
from samples import write_music

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import save_codec
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.generation import generate
from perceiver_ar.network.model import PerceiverAR

pytest.importorskip("fastapi", reason="needs perceiver-ar[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
FORMS = {
    "light-desktop": {"color_scheme": "light", "viewport": {"width": 1280, "height": 800}},
    "dark-phone": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_text_is_continued_stopped_undone_and_retried(
    browser: Any, url: str, model: PerceiverAR, tmp_path: Path, form: str
) -> None:
    context = browser.new_context(**FORMS[form])
    page = context.new_page()
    trouble, asked = list[str](), list[str]()
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    playwright.expect(page.get_by_role("heading", name="tiny")).to_be_visible()

    text, status = page.get_by_role("textbox", name="Text to go on from"), page.get_by_role("status")
    text.click()
    page.keyboard.type("Once\nupon\n")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("slider", name="Length").fill("32")
    page.get_by_role("slider", name="Temperature").fill("1")
    page.get_by_role("slider", name="Top-p").fill("1")

    def expected(seed: int) -> str:
        ids = generate(model, [[0, *b"Once\nupon\n"]], 32, seed=seed, stop_tokens=[0])[0]
        return BytesCodec().decode(ids.numpy()).decode(errors="replace")

    page.get_by_role("button", name="Continue").click()
    playwright.expect(status).to_contain_text("tokens")
    assert "".join(text.locator("span").all_text_contents()) == expected(3)
    page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/{form}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.get_by_role("button", name="Retry").click()
    playwright.expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    playwright.expect(page.get_by_label("Seed")).to_have_value("4")
    assert "".join(text.locator("span").all_text_contents()) == expected(4)

    # Another token in the place of one, and undone again.
    before = text.text_content()
    page.get_by_label("Shade what was unlikely").check()
    chosen = page.evaluate(
        "() => { const span = [...text.querySelectorAll('span')].find(span => Object.keys(span.alternatives ?? {})"
        ".some(other => other !== span.textContent && /^[!-~]$/.test(other))); span.click(); return span.textContent; }"
    )
    choices = page.get_by_role("group", name="What else could stand here")
    other = choices.get_by_role("button", disabled=False).filter(has_not_text=chosen).first
    letter = other.text_content()[0]
    page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/{form}-choices.png")
    other.click()
    playwright.expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    assert text.text_content().startswith(before[: before.index(chosen, 10)] + letter)
    page.get_by_role("button", name="Undo").click()
    assert text.text_content() == before

    page.get_by_role("button", name="Undo").click()
    assert text.text_content() == "Once\nupon\n"

    page.get_by_role("slider", name="Length").fill("1024")
    page.get_by_label("Seed").fill("")
    text.focus()
    page.keyboard.press("Control+Enter")
    playwright.expect(text.locator("span").first).to_be_attached()
    page.keyboard.press("Escape")
    playwright.expect(page.get_by_role("button", name="Continue")).to_be_enabled()

    assert trouble == []
    assert all(address.startswith((url, "data:")) for address in asked)
    context.close()


def test_a_piece_goes_on_and_can_be_heard_and_saved(browser: Any, serving: Any, tmp_path: Path) -> None:
    codec, run = PerformanceCodec(), tmp_path / "piano"
    size: dict[str, Any] = {"context_length": 64, "num_latents": 16, "dim": 16, "num_layers": 1, "num_heads": 2}
    randomize(PerceiverAR(codec.fit(PerceiverARConfig(vocab_size=codec.vocab_size, **size))), seed=1).save_pretrained(
        run
    )
    save_codec(codec, run)
    write_music(tmp_path / "prelude.mid", 3)
    with serving(run) as url:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        trouble = list[str]()
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(url)
        page.get_by_label("A file to go on from; without").set_input_files(tmp_path / "prelude.mid")
        page.get_by_role("slider", name="Length").fill("32")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.locator("#status")).to_contain_text("the files stay", timeout=120_000)
        assert page.evaluate(
            "async () => { const a = document.querySelector('audio'); a.muted = true; await a.play();"
            " await new Promise(done => a.ontimeupdate = () => a.currentTime > 0 && done()); return a.duration > 0; }"
        )
        with page.expect_download() as download:
            page.get_by_role("link", name="generated.mid").click()
        assert download.value.path().read_bytes().startswith(b"MThd")
        page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + "/piano.png", full_page=True)
        assert trouble == []
        context.close()
