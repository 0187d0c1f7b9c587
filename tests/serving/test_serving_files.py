"""Files go on over HTTP as `generate` and the codec would continue them; what is no file of the kind harms nobody."""

import asyncio
import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_refused
from PIL import Image
from reference import randomize
from samples import write_band, write_music, write_picture

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.image import ImageCodec
from perceiver_ar.data.integers import IntegerCodec
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.remi_plus import RemiPlusCodec
from perceiver_ar.generation import generate
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.serving.engine import Busy
from perceiver_ar.serving.worker import MAX_IDS, QUEUE, Stopping, TooMuch, Worker

pytest.importorskip("fastapi", reason="needs perceiver-ar[serve]")
httpx = pytest.importorskip("httpx2", reason="needs httpx2")

Made = Callable[..., tuple[Path, PerceiverAR]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Makes a run with a codec, and its model."""

    def make(codec: Codec, context: int = 64) -> tuple[Path, PerceiverAR]:
        config = PerceiverARConfig(
            vocab_size=codec.vocab_size, context_length=context, num_latents=16, dim=16, num_layers=1, num_heads=2
        )
        path = tmp_path / codec.name
        randomize(PerceiverAR(codec.fit(config)), seed=1).save_pretrained(path)
        save_codec(codec, path)
        return path, PerceiverAR.from_pretrained(path)

    return make


def test_music_goes_on_and_its_files_are_behind_links(serving: Any, made: Made, tmp_path: Path) -> None:
    codec = PerformanceCodec()
    run, model = made(codec)
    write_music(tmp_path / "prelude.mid", 3)
    data = (tmp_path / "prelude.mid").read_bytes()
    with serving(run, slots=2) as url, httpx.Client(base_url=url, timeout=120) as http:
        form = {"keep": "20", "max_new_tokens": "30", "n": "2", "seed": "5", "stream": "true", "temperature": "0.9"}
        with http.stream("POST", "/v1/generate", data=form, files={"file": ("../../x.mid", data)}) as answer:
            assert answer.status_code == 200
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        prompt = [*codec.separator, *codec.encode(data).tolist()][: len(codec.start()) + 20]
        expected = generate(
            model, [prompt], 30, num_samples=2, seed=5, temperature=0.9, allowed_next=codec.constraint(),
            stop_tokens=codec.separator[-1:],
        )  # fmt: skip
        assert events[0]["notes"] == codec.decode_notes(np.array(prompt)).round(3).tolist()
        for index in range(2):
            drawn, notes = list[int](), list[list[float]]()
            for event in events[1:-1]:
                for sample in event["samples"]:
                    if sample["index"] == index:
                        drawn += sample["ids"]
                        notes = notes[: sample["kept"]] + sample["notes"]
            assert drawn == expected[index, : len(drawn)].tolist()
            assert notes == codec.decode_notes(np.array(prompt + drawn)).round(3).tolist()
        files = {file["name"]: http.get(file["url"]) for file in events[-1]["files"]}
        assert {Path(name).suffix for name in files} == {".mid", ".png", ".wav"}
        assert files["generated-1.mid"].content == codec.decode(np.array([*prompt, *expected[0].tolist()]))
        assert files["generated-1.mid"].headers["content-type"].startswith("audio/")
        for name in ("nothing", "..%2Fmodel.safetensors", "%2Fetc%2Fpasswd"):
            link = events[-1]["files"][0]["url"].rpartition("/")[0]
            assert http.get(f"{link}/{name}").status_code == 404
        wrong = http.post("/v1/generate", files={"file": ("x.mid", b"no music")})
        assert wrong.status_code == 422
        assert wrong.json()["error"]["param"] == "file"


def test_music_goes_on_under_its_conditions(serving: Any, made: Made, tmp_path: Path) -> None:
    codec = ConditionedCodec(PerformanceCodec(), {"composer": ["bach", "chopin"], "mood": 6})
    run, model = made(codec)
    write_music(tmp_path / "a.mid", 1)
    data = (tmp_path / "a.mid").read_bytes()
    with serving(run) as url, httpx.Client(base_url=url, timeout=120) as http:
        form = {"keep": "20", "max_new_tokens": "80", "seed": "5", "condition": ["composer=chopin", "mood=slow"]}
        answer = http.post("/v1/generate", data=form, files={"file": ("a.mid", data)}).json()
        files = {file["name"]: http.get(file["url"]).content for file in answer["files"]}
        for condition in ("composer", "mood=very slow"):
            wrong = http.post("/v1/generate", data={"condition": condition})
            assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "condition"
    pinned = codec.condition_ids({"composer": "chopin", "mood": "slow"})
    prompt = [*codec.separator, *pinned, *codec.encode(data).tolist()][: 1 + len(pinned) + 20]
    options = {"allowed_next": codec.constraint(), "stop_tokens": codec.separator[-1:], "pinned": pinned}
    drawn = generate(model, [prompt], 80, seed=5, **options)[0].tolist()
    assert files["generated.mid"] == codec.decode(np.array([*prompt, *drawn]))


def test_bars_are_composed_anew(serving: Any, made: Made, tmp_path: Path) -> None:
    codec = RemiPlusCodec()
    run, model = made(codec, 2048)
    write_band(tmp_path / "a.mid", 0)
    data = (tmp_path / "a.mid").read_bytes()
    with serving(run) as url, httpx.Client(base_url=url, timeout=120) as http:
        file = {"file": ("a.mid", data)}
        form = {"infill": "3:4", "max_new_tokens": "40", "seed": "5", "stream": "true"}
        answer = http.post("/v1/generate", data=form, files=file).text
        events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        link = next(one for one in events[-1]["files"] if one["name"] == "generated.mid")
        result = http.get(link["url"]).content
        for wrong, message in (
            ({"infill": "2"}, "infill is '2': give the first and the last bar, such as 9:12"),
            ({"infill": "1:2"}, "infill is 1:2, but the piece has bars 1 to 12"),
            ({"infill": "2:3", "keep": "0.5"}, "leave out keep"),
        ):
            refused = http.post("/v1/generate", data=wrong, files=file)
            assert refused.status_code == 400 and message in refused.json()["error"]["message"]
        assert http.post("/v1/generate", data={"infill": "2:3"}).status_code == 400
    document = np.array([*codec.separator, *codec.encode(data)])
    row, prompt, _ = codec.infill(document, 3, 4, 2048)
    options = {"allowed_next": codec.constraint(), "stop_tokens": codec.separator[-1:]}
    drawn = generate(model, [prompt.tolist()], 40, seed=5, **options)[0].numpy()
    assert result == codec.decode(np.append(row, drawn))
    assert events[0]["notes"] == codec.decode_notes(row).round(3).tolist()
    run, _ = made(PerformanceCodec())
    with serving(run) as url, httpx.Client(base_url=url, timeout=120) as http:
        refused = http.post("/v1/generate", data={"infill": "2:3"}, files={"file": ("a.mid", data)})
        assert "has not learned to infill" in refused.json()["error"]["message"]


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def test_a_picture_is_completed(serving: Any, made: Made, tmp_path: Path) -> None:
    codec = ImageCodec(4, 4, "grey")
    run, _ = made(codec)
    write_picture(tmp_path / "cat.png", 1)
    with serving(run) as url, httpx.Client(base_url=url, timeout=120) as http:
        files = {"file": ("cat.png", (tmp_path / "cat.png").read_bytes())}
        with http.stream("POST", "/v1/generate", data={"seed": "0", "stream": "true"}, files=files) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        pictures = {sample["index"]: sample["picture"] for event in events[1:-1] for sample in event["samples"]}
        last = http.get(events[-1]["files"][0]["url"]).content
        assert np.array_equal(pixels(base64.b64decode(pictures[0])), pixels(last))
        answer = http.post("/v1/generate", data={"seed": "0"}, files=files).json()
        assert [file["name"] for file in answer["files"]] == [*(f"generated-{n}.png" for n in range(1, 5)),
                                                               "generated-grid.png"]  # fmt: skip
        assert answer["usage"]["completion_tokens"] == 4 * 8
        assert http.get(answer["files"][0]["url"]).content.startswith(b"\x89PNG")


def test_pictures_have_their_whole_context_and_end_with_it(
    serving: Any, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made(ImageCodec(4, 4, "grey"))
    assert_refused(capsys, "serve", run, "--port=0", "--max_context=9", says="max_context is 9, but a picture of this")
    with serving(run, max_context=16) as url, httpx.Client(base_url=url, timeout=120) as http:

        def complete(**body: Any) -> Any:
            return http.post("/v1/completions", json={"model": run.name, "temperature": 0, **body}).json()

        for drawn, prompt in ((16, [256]), (3, [256] + 13 * [7]), (0, [256] + 16 * [7])):
            assert complete(prompt=prompt, max_tokens=300)["usage"]["completion_tokens"] == drawn
        assert "a whole picture 17" in complete(prompt=[256] + 17 * [7], max_tokens=1)["error"]["message"]
        refused = http.post("/v1/generate", files={"file": ("a.png", b"no picture")}).json()["error"]["message"]
        assert "--modality" not in refused


def test_files_that_lie_are_refused_and_the_server_lives(serving: Any, made: Made) -> None:
    run, model = made(IntegerCodec(9))
    lying, honest = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(lying, {"descr": "|u1", "fortran_order": False, "shape": (10**13,)})
    np.save(honest, np.arange(5, dtype=np.uint8))
    with serving(run) as url, httpx.Client(base_url=url, timeout=120) as http:
        for data in (lying.getvalue(), b"\x93NUMPY", b""):
            assert http.post("/v1/generate", files={"file": ("x.npy", data)}).status_code in (413, 422)
        for form, param in (
            ({"keep": "0"}, "keep"),
            ({"n": "9"}, "n"),
            ({"temperature": "-1"}, "temperature"),
            ({"soundfont": "/etc/passwd"}, "soundfont"),
            ({"n": ["1", "1"]}, "n"),
        ):
            answer = http.post("/v1/generate", data=form)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
        file = "file", ("x.npy", honest.getvalue())
        two = http.post("/v1/generate", files=[file, file])
        assert two.status_code == 400 and "the form has file 2 times" in two.json()["error"]["message"]
        form = {"max_new_tokens": "4", "seed": "1"}
        answer = http.post("/v1/generate", data=form, files=[file]).json()
        [link] = answer["files"]
        codec = IntegerCodec(9)
        prompt = [*codec.separator, *range(5)]
        drawn = generate(model, [prompt], 4, seed=1, allowed_next=codec.constraint(), stop_tokens=codec.separator[-1:])
        expected = codec.decode(torch.cat([torch.tensor(prompt), drawn[0]]).numpy())
        assert http.get(link["url"]).content == expected
        lines = http.get("/metrics").text.splitlines()
        assert "perceiver_ar_generated_tokens_total 4.0" in lines
        assert f"perceiver_ar_prompt_tokens_total {len(prompt)}.0" in lines
        assert "perceiver_ar_first_token_seconds_count 1.0" in lines


def test_files_take_turns_and_ctrl_c_is_for_the_server(made: Made) -> None:
    run, _ = made(IntegerCodec(9))

    def npy(n: int) -> bytes:
        file = io.BytesIO()
        np.save(file, np.zeros(n, dtype=np.uint8))
        return file.getvalue()

    async def ask() -> None:
        worker = Worker(run)
        try:
            found = await asyncio.gather(*(worker.encode(npy(5)) for _ in range(QUEUE + 2)), return_exceptions=True)
            assert [type(one) for one in found] == [np.ndarray] * QUEUE + [Busy] * 2
            pid = worker._process.pid
            os.kill(pid, signal.SIGINT)
            assert (await worker.encode(npy(5))).tolist() == [*IntegerCodec(9).separator, *[0] * 5]
            assert worker._process.pid == pid
            with pytest.raises(TooMuch):
                await worker.encode(npy(MAX_IDS))
        finally:
            worker.close()

    asyncio.run(ask())


def test_closing_waits_for_no_file(made: Made) -> None:
    run, _ = made(IntegerCodec(9))

    async def ask() -> None:
        worker = Worker(run)
        task = asyncio.create_task(worker.encode(b""))
        await asyncio.sleep(0)
        await asyncio.to_thread(worker.close)
        [error] = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(error, Stopping | asyncio.CancelledError)
        assert worker._process is None

    asyncio.run(ask())


@pytest.mark.parametrize(("seconds", "status"), [(29, 200), (0, 503)])
def test_files_are_written_at_the_end_of_a_shutdown_if_time_remains(made: Made, seconds: int, status: int) -> None:
    from perceiver_ar.serving.server import Server, listen, load

    run, _ = made(IntegerCodec(9))
    server, listening = Server(load(run, slots=2)), listen("127.0.0.1", 0)
    server.job_seconds, server.file_seconds = 0, seconds
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as pool:
        while http.get("/health").status_code != 200:
            pass
        form = {"max_new_tokens": "1000000", "seed": "1", "repetition_penalty": "0.5", "top_k": "1"}
        answer = pool.submit(http.post, "/v1/generate", data=form)
        while server.engine.running == 0:
            time.sleep(0.01)
        server.should_exit = True
        assert answer.result().status_code == status
    thread.join(60)
    listening.close()


def test_a_worker_that_cannot_start_says_so(tmp_path: Path) -> None:
    async def ask() -> None:
        worker = Worker(tmp_path / "nothing")
        try:
            with pytest.raises(RuntimeError, match="did not start"):
                await worker.encode(b"")
        finally:
            worker.close()

    asyncio.run(ask())


def test_results_stay_within_their_limit() -> None:
    from perceiver_ar.serving.files import MAX_RESULTS, Results

    results = Results()
    first, second = results.add({"a": b"1"}), results.add({"b": bytes(MAX_RESULTS - 1)})
    assert results.get(first, "a") == b"1"
    results.add({"c": b"23"})
    assert results.get(first, "a") is results.get(second, "b") is None
    kept = results.add({"c": b"3"})
    with pytest.raises(TooMuch):
        results.add({"d": bytes(MAX_RESULTS + 1)})
    assert results.get(kept, "c") == b"3"
