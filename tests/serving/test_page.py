"""The page in a real browser: what is typed goes on, nothing is fetched from elsewhere, nothing fails."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perceiver_ar.data.text import BytesCodec
from perceiver_ar.generation import generate
from perceiver_ar.model import PerceiverAR

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
    assert text.locator("span").text_content() == expected(3)
    page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/{form}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.get_by_role("button", name="Retry").click()
    playwright.expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    playwright.expect(page.get_by_label("Seed")).to_have_value("4")
    assert text.locator("span").text_content() == expected(4)

    page.get_by_role("button", name="Undo").click()
    assert text.text_content() == "Once\nupon\n"

    page.get_by_role("slider", name="Length").fill("1024")
    page.get_by_label("Seed").fill("")
    text.focus()
    page.keyboard.press("Control+Enter")
    playwright.expect(text.locator("span")).to_be_visible()
    page.keyboard.press("Escape")
    playwright.expect(page.get_by_role("button", name="Continue")).to_be_enabled()

    assert trouble == []
    assert all(address.startswith((url, "data:")) for address in asked)
    context.close()
