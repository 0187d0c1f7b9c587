"""The page in a real browser: what is typed goes on, nothing is fetched from elsewhere, nothing fails."""

import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import window_nats
from reference import randomize
from samples import write_band, write_music

import perceiver_ar
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.audio import MuLawCodec
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.image import ImageCodec
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.remi_plus import RemiPlusCodec
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


def opened(browser: Any, url: str, **form: Any) -> Any:
    """A new page, whose `trouble` lists the errors that it reports."""
    page = browser.new_context(**form).new_page()
    page.trouble = list[str]()
    page.on("console", lambda message: page.trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.goto(url)
    return page


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
    page.get_by_role("slider", name="Repetition penalty").fill("1")

    def expected(seed: int) -> str:
        ids = generate(model, [[0, *b"Once\nupon\n"]], 32, seed=seed, stop_tokens=[0])[0]
        return BytesCodec().decode(ids.numpy()).decode(errors="replace")

    page.get_by_role("button", name="Continue").click()
    playwright.expect(status).to_contain_text("tokens")
    assert "".join(text.locator("span").all_text_contents()) == expected(3)
    whole = "Once\nupon\n" + expected(3)
    if "\ufffd" not in whole:
        ids = torch.tensor([0, *whole.encode()])
        bits = float(window_nats(model, ids).mean()) / math.log(2)
        playwright.expect(page.locator("#score")).to_have_text(
            f"{bits:.2f} bits a byte · {len(ids)} of 64 tokens of context used"
        )
    page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/{form}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.get_by_role("button", name="Retry").click()
    playwright.expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    playwright.expect(page.get_by_label("Seed")).to_have_value("4")
    assert "".join(text.locator("span").all_text_contents()) == expected(4)

    seed = page.get_by_label("Seed")
    seed.fill("")
    seed.press_sequentially("-")
    page.get_by_role("button", name="Retry").click()
    playwright.expect(status).to_have_text("the seed must be a number")
    assert "".join(text.locator("span").all_text_contents()) == expected(4)
    seed.fill("4")

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


def test_no_text_is_lost_when_a_request_fails(browser: Any, url: str, model: PerceiverAR) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    text, go_on = page.get_by_role("textbox", name="Text to go on from"), page.get_by_role("button", name="Continue")
    retry, undo = page.get_by_role("button", name="Retry"), page.get_by_role("button", name="Undo")

    def ended() -> str:
        playwright.expect(go_on).to_be_enabled()
        return text.text_content()

    def choose() -> str:
        """Takes another token in the place of the third one; returns the text up to it."""
        kept = page.evaluate(
            "() => { const spans = [...text.querySelectorAll('span')].filter(span => Object.keys(span.alternatives ??"
            " {}).some(other => other !== span.textContent && /^[!-~]$/.test(other))); const span = spans[0];"
            " let kept = ''; for (const node of text.childNodes) {"
            " if (node === span) break; kept += node.textContent; }"
            " const other = Object.keys(span.alternatives).find(o => o !== span.textContent && /^[!-~]$/.test(o));"
            " span.click(); [...choices.children].find(b => b.firstChild.textContent === other).click();"
            " return kept + other; }"
        )
        return kept

    text.click()
    page.keyboard.type("Once")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("slider", name="Length").fill("32")
    page.get_by_role("slider", name="Temperature").fill("1")
    page.get_by_role("slider", name="Repetition penalty").fill("1")
    go_on.click()
    playwright.expect(page.get_by_role("status")).to_contain_text("tokens")
    whole = ended()
    assert len(whole) > len("Once")
    context.set_offline(True)
    choose()
    assert ended() == whole
    undo.click()
    assert ended() == "Once"

    context.set_offline(False)
    go_on.click()
    playwright.expect(page.get_by_role("status")).to_contain_text("tokens")
    assert ended() == whole
    kept = choose()
    playwright.expect(page.get_by_role("status")).to_contain_text("tokens")
    chosen = ended()
    assert chosen.startswith(kept)
    context.set_offline(True)
    retry.click()
    assert ended() == chosen
    context.set_offline(False)
    retry.click()
    playwright.expect(page.get_by_role("status")).to_contain_text("tokens")
    again = ended()
    assert again.startswith(kept)
    assert len(text.locator("span").all_text_contents()) > 0
    ids = generate(model, [[0, *kept.encode()]], 32, seed=5, stop_tokens=[0], top_p=0.95)[0]
    assert again == kept + BytesCodec().decode(ids.numpy()).decode(errors="replace")
    undo.click()
    assert ended() == whole
    context.close()


KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", "": "text/html"}


class Broken(BaseHTTPRequestHandler):
    """Serves the page; the model's answers break off or are a proxy's errors."""

    models: ClassVar[tuple[int, bytes]]
    completion: ClassVar[tuple[int, bytes]]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2] or "index.html"
        file = Path(perceiver_ar.__file__).with_name("serving") / "page" / name
        self._answer(*(self.models if name == "models" else (200, file.read_bytes())), KINDS[file.suffix])

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(*self.completion)

    def _answer(self, status: int, body: bytes, kind: str = "text/html") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)


def test_what_goes_wrong_is_said(browser: Any) -> None:
    card = b'{"data": [{"id": "tiny", "context_length": 64, "writes_text": true, "document_length": null}]}'
    delta = b'data: {"choices": [{"text": "a", "logprobs": {"tokens": ["b"]}, "finish_reason": null}]}\n\n'
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    page = browser.new_page()
    try:
        for models, completion, said in (
            ((502, b"<html>"), (200, b""), "the server answers with status 502"),
            ((200, card), (502, b"<html>"), "the server answers with status 502"),
            ((200, card), (200, delta), "the answer broke off"),
        ):
            Broken.models, Broken.completion = models, completion
            page.goto(f"http://127.0.0.1:{server.server_port}")
            if models[0] == 200:
                page.get_by_role("button", name="Continue").click()
            playwright.expect(page.get_by_role("status")).to_have_text(said)
    finally:
        page.close()
        server.shutdown()
        thread.join()
        server.server_close()


def random_run(path: Path, codec: Codec, context: int = 64) -> Path:
    size: dict[str, Any] = {"context_length": context, "num_latents": 16, "dim": 16, "num_layers": 1, "num_heads": 2}
    config = codec.fit(PerceiverARConfig(vocab_size=codec.vocab_size, **size))
    randomize(PerceiverAR(config), seed=1).save_pretrained(path)
    save_codec(codec, path)
    return path


@pytest.mark.parametrize(("codec", "shown"), [(ImageCodec(8, 8, "grey"), "img"), (MuLawCodec(8000), "canvas")])
def test_pictures_and_sound_are_shown(browser: Any, serving: Any, tmp_path: Path, codec: Codec, shown: str) -> None:
    with serving(random_run(tmp_path, codec)) as url:
        page = opened(browser, url, **FORMS["dark-phone"])
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.locator("#status")).to_contain_text("the files stay", timeout=120_000)
        playwright.expect(page.locator(f"#results {shown}").first).to_be_visible()
        page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/{shown}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.trouble == []
        page.context.close()


def test_a_piece_goes_on_and_can_be_heard_and_saved(browser: Any, serving: Any, tmp_path: Path) -> None:
    run = random_run(tmp_path / "piano", PerformanceCodec())
    write_music(tmp_path / "prelude.mid", 3)
    with serving(run) as url:
        page = opened(browser, url, viewport={"width": 1280, "height": 800})
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
        roll = page.get_by_role("img", name="Piano roll")
        assert int(re.findall(r"\d+", roll.get_attribute("aria-label"))[0]) > 0
        coloured = (
            "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert roll.evaluate(coloured) > 2
        page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + "/piano.png", full_page=True)

        loop = page.get_by_role("button", name="Loop")
        playwright.expect(loop).to_have_attribute("aria-pressed", "false")
        loop.click()
        playwright.expect(loop).to_have_attribute("aria-pressed", "true")
        assert page.evaluate(  # it has come to the end, and goes on from the start
            "async () => { const a = document.querySelector('audio');"
            " a.muted = true; a.currentTime = a.duration - .05; await a.play();"
            " await new Promise(done => a.ontimeupdate = () => a.currentTime < a.duration / 2 && done());"
            " return !a.paused && !a.ended; }"
        )
        loop.click()
        assert page.evaluate("() => { const a = document.querySelector('audio'); a.pause(); return !a.loop; }")

        # A beginning that is played, on two kinds of keys.
        page.get_by_role("button", name="C 4").click()
        page.keyboard.press("g")
        playwright.expect(page.get_by_text("2 notes played")).to_be_visible()
        page.get_by_role("slider", name="Keep").fill("1")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(roll).to_have_count(2)
        playwright.expect(roll.first).to_have_attribute("aria-label", re.compile("Piano roll: 2 notes"))
        playwright.expect(page.locator("#status")).to_contain_text("the files stay")
        page.get_by_role("button", name="Forget").click()
        playwright.expect(page.get_by_role("button", name="Forget")).to_be_disabled()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.trouble == []
        page.context.close()


def test_conditions_and_bars_to_infill_are_chosen(browser: Any, serving: Any, tmp_path: Path) -> None:
    codec = ConditionedCodec(RemiPlusCodec(), {"style": ["polka", "waltz"], "mood": 8})
    song = tmp_path / "song.mid"
    write_band(song, 0)
    run = random_run(tmp_path / "band", codec, 2048)
    with serving(run) as url:
        page = opened(browser, url, **FORMS["dark-phone"])
        page.get_by_role("combobox", name="style").select_option("waltz")
        page.get_by_role("textbox", name="mood").fill("slow")
        page.get_by_label("A file to go on from; without").set_input_files(song)
        page.get_by_role("spinbutton", name="from bar").fill("3")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.get_by_role("status")).to_have_text("give both bars, as numbers")
        page.get_by_role("spinbutton", name="to bar").fill("4")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("slider", name="Temperature").fill("1")
        page.get_by_role("slider", name="Top-p").fill("1")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.locator("#status")).to_contain_text("the files stay", timeout=120_000)
        for width, name in ((390, "phone"), (1280, "desktop")):
            page.set_viewport_size({"width": width, "height": 800})
            page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/band-{name}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        with page.expect_download() as download:
            page.get_by_role("link", name="generated.mid").click()
        pinned = codec.condition_ids({"style": "waltz", "mood": "slow"})
        document = np.array([*codec.separator, *pinned, *codec.encode(song.read_bytes())])
        row, prompt, count = codec.infill(document, 3, 4, 2048)
        options = {"allowed_next": codec.constraint(), "stop_tokens": codec.separator[-1:], "pinned": pinned}
        drawn = generate(PerceiverAR.from_pretrained(run), [prompt.tolist()], count, seed=3, **options)[0]
        assert download.value.path().read_bytes() == codec.decode(np.append(row, drawn.numpy()))
        assert page.trouble == []
        page.get_by_role("textbox", name=re.compile("tempo")).fill("96")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.get_by_role("status")).to_contain_text("condition tempo begins a new document")
        page.context.close()


def test_a_picture_has_its_class(browser: Any, serving: Any, tmp_path: Path) -> None:
    codec = ImageCodec(6, 6, "grey", classes=["cat", "dog"])
    run = random_run(tmp_path / "pets", codec)
    with serving(run) as url:
        page = opened(browser, url)
        page.get_by_role("combobox", name="class").select_option("dog")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("slider", name="Takes").fill("1")
        page.get_by_role("slider", name="Top-p").fill("1")
        page.get_by_role("slider", name="Temperature").fill("1")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.locator("#status")).to_contain_text("the files stay", timeout=120_000)
        with page.expect_download() as download:
            page.get_by_role("link", name="generated.png").click()
        prompt = codec.start("dog").tolist()
        options = {"allowed_next": codec.constraint()}
        drawn = generate(PerceiverAR.from_pretrained(run), [prompt], 36, seed=3, **options)[0]
        assert download.value.path().read_bytes() == codec.decode(np.append(prompt, drawn.numpy()))
        assert page.trouble == []
        page.context.close()


def test_a_text_has_its_conditions(browser: Any, serving: Any, tmp_path: Path) -> None:
    codec = ConditionedCodec(BytesCodec(), {"kind": ["letter", "list"]})
    run = random_run(tmp_path / "texts", codec)
    with serving(run) as url:
        page = opened(browser, url)
        page.get_by_role("combobox", name="kind").select_option("list")
        page.get_by_role("textbox", name="Text to go on from").fill("Once")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("slider", name="Length").fill("32")
        page.get_by_role("slider", name="Top-p").fill("1")
        page.get_by_role("slider", name="Temperature").fill("1")
        page.get_by_role("slider", name="Repetition penalty").fill("1")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.get_by_role("status")).to_contain_text("tokens")
        pinned = codec.condition_ids({"kind": "list"})
        options = {"allowed_next": codec.constraint(), "stop_tokens": [0], "pinned": pinned}
        ids = generate(PerceiverAR.from_pretrained(run), [[0, *pinned, *b"Once"]], 32, seed=3, **options)[0]
        shown = "".join(page.locator("#text span").all_text_contents())
        assert shown == codec.decode(ids.numpy()).decode(errors="replace")

        # The conditions are given, so their bits do not count.
        page.get_by_role("textbox", name="Text to go on from").fill("Once upon")
        nats = window_nats(PerceiverAR.from_pretrained(run), torch.tensor([0, *pinned, *b"Once upon"]))[len(pinned) :]
        bits = float(nats.mean()) / math.log(2)
        playwright.expect(page.locator("#score")).to_have_text(
            f"{bits:.2f} bits a byte · {1 + len(pinned) + 9} of 64 tokens of context used"
        )
        page.context.close()


def test_each_take_has_all_of_its_files(browser: Any) -> None:
    page = browser.new_page()
    page.set_content("<section></section>")
    for script in ("common.js", "files.js"):
        page.add_script_tag(path=Path(perceiver_ar.__file__).parent / "serving/page" / script)
    names = [f"generated-{take}{rest}" for take in (1, 2, 11) for rest in (".mid", "-continuation.mid")]
    shown = page.evaluate(
        """names => {
            const takes = document.querySelector("section"), rolls = Array.from({length: 11}, () => null);
            takes.append(...rolls.map(() => document.createElement("figure")));
            addFiles(takes, rolls, names.map(name => ({name, url: `/${name}`, media_type: "audio/midi"})));
            return [...takes.children].map(take => [...take.querySelectorAll("a")].map(link => link.download));
        }""",
        names,
    )
    assert [shown[take - 1] for take in (1, 2, 3, 11)] == [names[:2], names[2:4], [], names[4:]]
    page.close()


def test_several_takes_are_kept_heard_and_saved(browser: Any, serving: Any, tmp_path: Path) -> None:
    with serving(random_run(tmp_path / "piano", PerformanceCodec()), slots=2) as url:
        page = opened(browser, url, **FORMS["dark-phone"])
        takes = page.get_by_role("slider", name="Takes")
        playwright.expect(takes).to_have_attribute("max", "2")  # as the server has slots
        takes.fill("2")
        page.get_by_role("slider", name="Length").fill("32")
        page.get_by_label("Seed").fill("1")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.locator("#status")).to_contain_text("the files stay", timeout=120_000)
        roll, buttons = page.get_by_role("img", name="Piano roll"), page.get_by_role("button", name=re.compile("Take "))
        playwright.expect(roll).to_have_count(1)
        playwright.expect(buttons).to_have_count(2)
        playwright.expect(buttons.first).to_have_attribute("aria-pressed", "true")
        saved, drawings = set[bytes](), set[str]()
        for number in (1, 2):
            buttons.nth(number - 1).click()
            playwright.expect(roll).to_have_count(1)
            page.wait_for_function("() => document.querySelector('canvas.roll:not([hidden])').width > 300")
            drawings.add(roll.evaluate("canvas => canvas.toDataURL()"))
            with page.expect_download() as download:
                page.get_by_role("link", name=f"generated-{number}.mid").click()
            saved.add(download.value.path().read_bytes())
        assert len(saved) == len(drawings) == 2
        # Playing a take shows it, and silences the others.
        page.evaluate(
            "() => Promise.all([...document.querySelectorAll('audio')].map(a => { a.muted = a.loop = true; }))"
        )
        page.evaluate("() => document.querySelectorAll('audio')[1].play()")
        playwright.expect(buttons.nth(1)).to_have_attribute("aria-pressed", "true")
        page.evaluate("() => document.querySelectorAll('audio')[0].play()")
        playwright.expect(buttons.first).to_have_attribute("aria-pressed", "true")
        page.wait_for_function("() => document.querySelectorAll('audio')[1].paused")
        for width, name in ((390, "phone"), (1280, "desktop")):
            page.set_viewport_size({"width": width, "height": 800})
            path = os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/takes-{name}.png"
            page.screenshot(path=path, full_page=True)
            assert page.evaluate(
                "() => [...results.querySelectorAll('figure *')].every(one => one.getBoundingClientRect().right"
                " <= one.closest('figure').getBoundingClientRect().right + 1)"
            )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.trouble == []
        page.context.close()
