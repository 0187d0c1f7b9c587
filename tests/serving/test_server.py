"""A real server on loopback, and real clients."""

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG
from helpers import window_nats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import randomize

from perceiver_ar.cli import main
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.generation import generate
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.serving.engine import Engine
from perceiver_ar.serving.text import Vocabulary

pytest.importorskip("fastapi", reason="needs perceiver-ar[serve]")
openai = pytest.importorskip("openai", reason="needs the client openai")
httpx = pytest.importorskip("httpx2", reason="needs httpx2, which openai brings")

http = httpx.Client(timeout=60)


@pytest.fixture(scope="module", autouse=True)
def _connections_are_closed() -> Iterator[None]:
    yield
    http.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text(model: PerceiverAR, prompt: str, count: int, **settings: Any) -> str:
    """What `generate` gives for a prompt, the start of a document before it."""
    ids = generate(model, [[0, *prompt.encode()]], count, stop_tokens=[0], **settings)
    return BytesCodec().decode(ids[0].numpy()).decode(errors="replace")


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def metric(url: str, name: str) -> float:
    lines = http.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def rows_running(url: str) -> float:
    return metric(url, "perceiver_ar_rows_running")


# Completions


def test_a_completion_is_what_generate_draws(client: Any, model: PerceiverAR) -> None:
    answer = client.completions.create(model="tiny", prompt="Once", max_tokens=20, seed=3, temperature=0.7)
    assert answer.choices[0].text == text(model, "Once", 20, seed=3, temperature=0.7)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens <= 20
    assert answer.object == "text_completion"


def test_a_completion_has_conditions_in_front_of_every_window(serving: Any, tmp_path: Path) -> None:
    codec = ConditionedCodec(BytesCodec(), {"kind": ["high", "low"], "year": ["1812"], "note": 4})
    config = PerceiverARConfig(**CONFIG).replace(vocab_size=codec.vocab_size)
    randomize(PerceiverAR(config), seed=1).save_pretrained(tmp_path)
    save_codec(codec, tmp_path)
    model, count = PerceiverAR.from_pretrained(tmp_path), 2 * CONFIG["context_length"]
    with serving(tmp_path) as url:
        note = [261 + 1 + byte for byte in "é!".encode()]
        for given, front in (({"kind": "low", "note": "é!"}, [258, 259, *note, 261]), (None, [256, 259, *[261] * 4])):
            body = {"prompt": "Once", "condition": given, "max_tokens": count, "seed": 3, "logprobs": 0, "echo": True}
            answer = http.post(f"{url}/v1/completions", json=body).json()["choices"][0]
            start = [0, *front, *b"Once"]
            options = {"pinned": front, "allowed_next": codec.constraint(), "stop_tokens": [0], "seed": 3}
            ids = generate(model, [start], count, **options)[0].numpy()
            assert answer["text"] == "Once" + codec.decode(ids).decode(errors="replace")
            assert len(answer["logprobs"]["tokens"]) == len(start) + len(ids)
        for body, says in (
            ({"prompt": "a", "condition": {"kind": "lo"}}, "known are high, low"),
            ({"prompt": [1], "condition": {"kind": "low"}}, "condition is for texts"),
            ({"prompt": "a", "condition": {"note": "a waltz"}}, "note has 7 bytes of text, of at most 4: shorten it"),
            ({"prompt": "a", "condition": {"note": "\ud800"}}, "note is not Unicode text"),
        ):
            answer = http.post(
                f"{url}/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 400 and says in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "condition"
        assert http.get(f"{url}/v1/models").json()["data"][0]["conditions"]["note"] == 4


def test_a_stream_is_the_same_in_pieces_under_one_id(client: Any, model: PerceiverAR) -> None:
    options = {"include_usage": True}
    stream = client.completions.create(
        model="tiny", prompt="Once", max_tokens=20, seed=4, n=2, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens <= 40
    for index in range(2):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(piece.text for piece in pieces) == text(model, "Once", 20, seed=4 + index)
        assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_a_stream_ends_with_done(url: str) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-1])


def test_prompts_are_texts_or_ids_one_or_several(client: Any, model: PerceiverAR) -> None:
    ids = [[0, 72, 105], [0, 72, 111]]
    texts = [text(model, "Hi", 9, seed=1), text(model, "Ho", 9, seed=2)]
    for prompt in (["Hi", "Ho"], ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=1)
        assert [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)] == texts
    answer = client.completions.create(model="tiny", prompt=ids[0], max_tokens=9, seed=1)
    assert answer.choices[0].text == texts[0]


def test_sampling_is_of_each_request(client: Any, model: PerceiverAR) -> None:
    ours = {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}
    theirs = {"top_p": 0.9, "temperature": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=30, seed=5, extra_body=ours, **theirs)
    assert answer.choices[0].text == text(model, "x", 30, seed=5, **ours, **theirs)


def test_a_text_ends_before_its_stop(client: Any, model: PerceiverAR) -> None:
    whole = generate(model, [[0, 120]], 30, seed=6)[0].tolist()
    at = next(i for i in range(5, 30) if whole[i] < 128 and whole[i] not in whole[:i])
    stop = chr(whole[at])
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=30, seed=6, stop=["never", stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == bytes(whole[:at]).decode(errors="replace")
        assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_of_the_tokens_drawn(client: Any, model: PerceiverAR) -> None:
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=12, seed=7, logprobs=7)
    logprobs, names = answer.choices[0].logprobs, Vocabulary(BytesCodec()).names
    assert len(logprobs.tokens) == answer.usage.completion_tokens
    ids = generate(model, [[0, 120]], 12, seed=7)[0].tolist()
    row = [0, 120]
    for i, token in enumerate(ids[: len(logprobs.tokens)]):
        with torch.no_grad():
            expected = model(torch.tensor([row[-16:]]))[0, -1].double().log_softmax(-1)
        assert logprobs.token_logprobs[i] == pytest.approx(float(expected[token]), abs=1e-4)
        assert 7 <= len(logprobs.top_logprobs[i]) <= 8
        assert logprobs.top_logprobs[i][logprobs.tokens[i]] == logprobs.token_logprobs[i]
        row.append(token)
    assert logprobs.tokens == [names[token] for token in ids[: len(logprobs.tokens)]]


def test_an_echo_scores_the_prompt_as_it_would_be_drawn(client: Any, model: PerceiverAR) -> None:
    prompt = "A prompt that is longer than the context of this model, so that windows move: " * 2
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(prompt)
    assert logprobs.token_logprobs[0] is None
    ids = [0, *prompt.encode()]
    expected = -window_nats(model, torch.tensor(ids))
    assert logprobs.token_logprobs[1:-1] == pytest.approx(expected.tolist(), abs=1e-4)
    offsets = logprobs.text_offset[1:-1]
    assert [prompt[offset] for offset in offsets] == logprobs.tokens[1:-1]
    only = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert only.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]
    assert only.choices[0].text == prompt
    assert only.usage.completion_tokens == 0


def test_an_echo_scores_texts_of_any_length_alike(client: Any, model: PerceiverAR) -> None:
    """As transformers' forward does (tests/test_huggingface.py), so lm-evaluation-harness finds the same with both."""
    ids = torch.randint(1, 256, (200,), generator=torch.Generator().manual_seed(0))
    expected, lengths = (-window_nats(model, ids)).tolist(), (2, 16, 17, 18, 25, 64, 65, 66, 120, 200)
    prompts = [ids[:length].tolist() for length in lengths]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=0, echo=True, logprobs=0)
    for length, choice in zip(lengths, answer.choices, strict=True):
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected[: length - 1], abs=1e-4)


def test_all_samples_have_the_scores_of_the_prompt(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "A prompt", "max_tokens": 4, "echo": True, "logprobs": 2, "seed": 1}
    [first] = client.completions.create(**asked).choices
    both = client.completions.create(**asked, n=2).choices
    assert both[0].text == first.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert getattr(both[1].logprobs, name)[:9] == getattr(first.logprobs, name)[:9]
    assert both[1].text.startswith("A prompt")
    assert [both[1].text[offset] for offset in both[1].logprobs.text_offset[1:9]] == list("A prompt")


def test_a_character_may_be_echoed_in_part_and_drawn_to_its_end() -> None:
    from perceiver_ar.serving.completions import Choice

    choice = Choice(0, Vocabulary(BytesCodec()), [], 0)
    choice.echo([0, 0xE6, 0x97], None)
    first = choice.delta(choice.text.echo(b"\xe6\x97"))
    second = choice.push(0xA5, torch.zeros(256), "length")
    assert (first.text, second.text) == ("", "\u65e5")
    assert [token.offset for token in (*first.tokens, *second.tokens)] == [0, 0, 0, 0]


def test_prompts_with_too_many_scores_are_refused(url: str) -> None:
    body = {"prompt": ["a" * 1000] * 2, "max_tokens": 0, "echo": True, "logprobs": 100, "n": 2}
    answer = http.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert "prompt has 2002 tokens to score, with n 2 and logprobs 100" in answer.json()["error"]["message"]


def test_a_client_that_does_not_read_ends_its_rows(model: PerceiverAR) -> None:
    from perceiver_ar.serving.completions import Choice, Delta, Listener
    from perceiver_ar.serving.metrics import Metrics
    from perceiver_ar.serving.outbox import Outbox
    from perceiver_ar.serving.protocol import MAX_UNREAD

    async def unread() -> tuple[bool, bool, Any]:
        results = asyncio.Queue[Delta | Exception]()
        choice = Choice(0, Vocabulary(BytesCodec()), [], None)
        outbox = Outbox()
        outbox.loop = asyncio.get_running_loop()
        listener = Listener(outbox, results, [choice], None, Metrics(Engine(model, slots=1)))
        goes_on = listener.token(0, 97, torch.zeros(256), None)
        for _ in range(MAX_UNREAD):
            results.put_nowait(Delta(0, "a"))
        more = listener.token(0, 97, torch.zeros(256), None)
        outbox.flush()
        await asyncio.sleep(0)
        last = [results.get_nowait() for _ in range(results.qsize())][-1]
        return goes_on, more, last

    goes_on, more, last = asyncio.run(unread())
    assert goes_on
    assert not more
    assert last.finish == "length"


def test_under_load_every_text_is_that_of_generate_alone(url: str, model: PerceiverAR) -> None:
    def one(number: int) -> tuple[str, str]:
        prompt, count, temperature = "abc "[: number % 5] * number, 5 + 9 * (number % 4), 0.5 + number / 10
        asked = {"max_tokens": count, "temperature": temperature, "seed": number}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=9) as client:
            if number % 3 == 2:  # goes away in the middle
                most = asked | {"max_tokens": 500}
                with client.completions.create(model="tiny", prompt=prompt, stream=True, **most) as gone:
                    next(iter(gone))
            stream = client.completions.create(model="tiny", prompt=prompt, stream=True, **asked)
            found = "".join(chunk.choices[0].text for chunk in stream)
        return found, text(model, prompt, count, temperature=temperature, seed=number)

    with ThreadPoolExecutor(8) as pool:
        for found, expected in pool.map(one, range(12)):
            assert found == expected


# What is not served


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"50256": -100}),
        ("suffix", "end"),
        ("best_of", 3),
        ("n", 5),
        ("messages", []),
        ("prompt", []),
        ("prompt", ["a", 1]),
        ("prompt", [256]),
        ("prompt", [[0], []]),
        ("prompt", "\ud800"),
        ("prompt", "\x00"),
        ("prompt", None),
        ("stop", ["a"] * 17),
        ("max_tokens", -1),
        ("max_tokens", "9"),
        ("temperature", -1),
        ("temperature", 1e999),
        ("top_p", 0),
        ("top_k", -2),
        ("logprobs", 101),
        ("stream_options", {"include_usage": True}),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-310),
        ("frequency_penalty", -1.7e308),
        ("presence_penalty", 101),
    ],
)
def test_what_is_not_supported_is_refused_by_name(url: str, field: str, value: Any) -> None:
    body = {"prompt": "a", field: value}
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"{url}/v1/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field
    assert field in error["message"]


def test_neutral_values_of_clients_are_accepted(url: str) -> None:
    neutral = {
        **dict.fromkeys(("stop", "seed", "logprobs", "top_p", "max_tokens", "suffix", "logit_bias", "stream_options")),
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stream": False,
        "echo": False,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "user": "somebody",
        "temperature": 1,
    }
    answer = http.post(f"{url}/v1/completions", json={"prompt": "a", "model": "tiny", **neutral})
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 16


def test_errors_have_one_form(url: str, client: Any) -> None:
    post = f"{url}/v1/completions"
    for answer, status in (
        (http.get(f"{url}/nothing"), 404),
        (http.get(post), 405),
        (http.post(post, content=b"{", headers={"Content-Type": "application/json"}), 400),
        (http.post(post, content=b"[" * 100_000, headers={"Content-Type": "application/json"}), 400),
        (http.post(post, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}), 400),
        (http.post(post, json={"prompt": "a", "model": "other"}), 404),
        (http.post(post, content=b" " * (16 * 2**20 + 1)), 413),
        (http.post(post, content=iter([b" " * 2**20] * 17), headers={"Content-Type": "application/json"}), 413),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.completions.create(model="other", prompt="a")


@pytest.mark.parametrize(("path", "field"), [("completions", "prompt"), ("../detokenize", "tokens")])
def test_a_list_of_ids_longer_than_any_useful_one_is_not_parsed(url: str, path: str, field: str) -> None:
    most = 5 * 2**18  # "256, " for each token that may be scored
    for before, after in (("[", "]"), ("[\n [", "]]")):
        content = f'{{"model": "tiny", "{field}" : {before}1{", 1" * (most // 3)}{after}}}'
        answer = http.post(f"{url}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["message"].startswith(f"{field} is a list of ids in more than {most} bytes")


def test_a_text_of_that_size_is_read_whatever_is_in_it(url: str) -> None:
    text = '{"prompt": [1, 2], "tokens": [[3]]} ' * 40_000
    for prompt in (text, [text]):
        answer = http.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] == len(text) + 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    *("prompt", "max_tokens", "n", "stop", "seed", "logprobs", "echo", "stream", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/v1/completions", "/tokenize", "/detokenize"]), st.dictionaries(st.sampled_from(FIELDS), anything)
)
def test_whatever_is_sent_is_answered(url: str, path: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, **fields})
    answer = http.post(f"{url}{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)
    assert http.get(f"{url}/health").status_code == 200


raw = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda name, value: b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n--x--\r\n' % (name, value),
        st.sampled_from([b"file", b"prompt", b"keep", b"n", b"seed", b'file"; filename="a', b"\xff", b""]),
        st.binary(max_size=9) | st.sampled_from([b"nan", b"1e999", b"-0", b"9" * 99]),
    ),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]),
    st.sampled_from(["/", "/v1/completions", "/v1/generate", "/v1/models", "/v1/files/a/b", "/metrics", "/tokenize"]),
    st.sampled_from(["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "x"]),
    raw,
)
def test_whatever_bytes_are_sent_are_answered(url: str, method: str, path: str, kind: str, body: bytes) -> None:
    body = body.replace(b"--x--", b'--x\r\nContent-Disposition: form-data; name="max_new_tokens"\r\n\r\n1\r\n--x--')
    answer = http.request(method, f"{url}{path}", content=body, headers={"Content-Type": kind})
    assert answer.status_code < 500
    assert http.get(f"{url}/health").status_code == 200


def test_weights_that_give_nan_are_an_error_of_the_server(serving: Any, tmp_path: Path) -> None:
    broken = randomize(PerceiverAR(PerceiverARConfig(**CONFIG)), seed=1)
    with torch.no_grad():
        broken.embed.weight[98] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    save_codec(BytesCodec(), tmp_path / "broken")
    with serving(tmp_path / "broken", slots=1) as url:
        for body in ({"max_tokens": 3}, {"max_tokens": 0, "echo": True, "logprobs": 1}):
            answer = http.post(f"{url}/v1/completions", json={"prompt": "abc", **body})
            assert answer.status_code == 500
            assert "weights give NaN" in answer.json()["error"]["message"]
            with http.stream("POST", f"{url}/v1/completions", json={"prompt": "abc", "stream": True, **body}) as stream:
                last = [line for line in stream.iter_lines() if line.startswith("data: ")][-1]
            assert json.loads(last[6:])["error"]["type"] == "server_error"
        lines = http.get(f"{url}/metrics").text
        assert 'perceiver_ar_requests_total{path="/v1/completions",status="500"} 2.0' in lines
        assert "perceiver_ar_disconnects_total 0.0" in lines


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_only_the_engine_keeps_openmp_threads(tmp_path: Path) -> None:
    PerceiverAR(PerceiverARConfig(**CONFIG).replace(dim=512)).save_pretrained(tmp_path)
    save_codec(BytesCodec(), tmp_path)
    script = """
import os, sys, time, torch
from perceiver_ar.serving.server import load
def count():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
before = count()
load(sys.argv[1])
until = time.monotonic() + 100
while count() != before + 3 and time.monotonic() < until:  # the engine's thread, and two of OpenMP
    time.sleep(0.01)
assert count() == before + 3, (before, count())
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)


SCOPE = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"host", b"localhost")]}
LIMITS: dict[str, Any] = {"api_key": None, "max_body": 9, "max_bodies": 15, "body_seconds": 9}


def test_an_unexpected_error_is_answered_and_counted() -> None:
    from perceiver_ar.serving.security import Guard

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    async def ask() -> None:
        guard = Guard(broken, answered=lambda *of: answered.append(of), **LIMITS)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await guard(SCOPE, receive, send)

    answered, sent = list[Any](), list[Any]()
    asyncio.run(ask())
    assert answered == [("other", 500)]
    assert json.loads(sent[1]["body"])["error"]["type"] == "server_error"


def test_the_bodies_of_all_requests_together_are_limited() -> None:
    from perceiver_ar.serving.security import Guard

    async def ask() -> list[int | None]:
        enough = asyncio.Event()

        async def read(scope: Any, receive: Any, send: Any) -> None:
            try:
                await receive()
            except HTTPException as error:
                statuses.append(error.status_code)
            else:
                statuses.append(None)
                await enough.wait()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"12345678"}

        async def send(message: Any) -> None: ...

        statuses, guard = list[int | None](), Guard(read, answered=lambda *of: None, **LIMITS)
        first = asyncio.create_task(guard(SCOPE, receive, send))
        await asyncio.sleep(0)
        await guard(SCOPE, receive, send)
        enough.set()
        await first
        await guard(SCOPE, receive, send)
        return statuses

    from starlette.exceptions import HTTPException

    assert asyncio.run(ask()) == [None, 503, None]


def test_waiting_for_a_body_is_cancelled_also_in_the_moment_of_its_arrival() -> None:
    from perceiver_ar.serving.security import Guard

    async def ask(turns: int) -> None:
        arrives = asyncio.get_running_loop().create_future()
        never = asyncio.get_running_loop().create_future()
        messages = iter([arrives, never])

        async def read(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await receive()

        async def receive() -> dict[str, Any]:
            return await next(messages)

        async def send(message: Any) -> None: ...

        request = asyncio.create_task(Guard(read, answered=lambda *of: None, **LIMITS)(SCOPE, receive, send))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        arrives.set_result({"type": "http.request", "body": b"1"})
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait({request}, timeout=5)
        assert request.cancelled()

    for turns in range(4):
        asyncio.run(ask(turns))


def test_a_stream_without_events_has_comments_up_to_its_end() -> None:
    from perceiver_ar.serving.app import Events

    async def answer() -> None:
        pinged, gone = asyncio.Event(), asyncio.Event()

        async def content() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await pinged.wait()
            yield b"data: 2\n\n"

        async def send(message: Any) -> None:
            sent.append(message.get("body"))
            if message.get("body", b"").startswith(b":"):
                pinged.set()

        async def receive() -> Any:
            await gone.wait()

        await Events(content(), ended.append, ping_seconds=0.01)(SCOPE, receive, send)
        sent.append("end")
        await asyncio.sleep(0.1)

    sent, ended = list[Any](), list[bool]()
    asyncio.run(answer())
    assert sent[:2] == [None, b"data: 1\n\n"]
    assert b": ping\n\n" in sent
    assert sent[-2:] == [b"", "end"]
    assert ended == [True]


# Who goes away, and who comes when there is no room


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_clients_that_go_away_end(url: str, stream: bool) -> None:
    def gone() -> float:
        return metric(url, "perceiver_ar_disconnects_total")

    before = gone()
    body = json.dumps({"prompt": "a", "max_tokens": 1_000_000, "n": 3, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(request("/v1/completions", "application/json", body))
        until(lambda: rows_running(url) >= 1, "the rows do not run")
    until(lambda: rows_running(url) == 0, "the rows still run")
    until(lambda: gone() == before + 1, "the disconnect is not counted")


def request(path: str, kind: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length or len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def test_nothing_remains_of_200_clients_that_go_away(url: str) -> None:
    def spooled() -> set[str]:
        """Temporary files without a name that this process holds open, on Linux."""
        names = set[str]()
        for descriptor in Path("/proc/self/fd").glob("*"):
            with suppress(OSError):
                names.add(str(descriptor.readlink()))
        return {name for name in names if name.endswith("(deleted)")}

    body = {"prompt": "a" * 300, "max_tokens": 1_000_000}
    kinds = [
        request("/v1/completions", "application/json", json.dumps({**body, **more}).encode())
        for more in ({"stream": True}, {"n": 3}, {"echo": True, "logprobs": 1})
    ]
    kinds.append(kinds[0][:-9])
    before, reset = spooled(), struct.pack("ii", 1, 0)
    for number in range(200):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(kinds[number % 4])
            if number % 8 == 0:
                connection.recv(1)
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    until(lambda: rows_running(url) == metric(url, "perceiver_ar_prompts_waiting") == 0, "rows still run")
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(2**21)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(request("/v1/generate", "multipart/form-data; boundary=x", part, 2**22))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    until(lambda: spooled() <= before, "a file remains")


def test_a_full_queue_says_when_to_come_again(serving: Any, run: Path) -> None:
    with serving(run, slots=1) as url:
        body = {"prompt": ["a"] * 128, "max_tokens": 1_000_000, "stream": True}
        with http.stream("POST", f"{url}/v1/completions", json=body):
            until(lambda: rows_running(url) == 1, "no row runs")
            answer = http.post(f"{url}/v1/completions", json={"prompt": ["a"] * 2})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["type"] == "server_error"


# Keys and hosts


def test_the_openai_client_sends_the_key(serving: Any, run: Path) -> None:
    with (
        serving(run, api_key="secret") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
    ):
        assert [card.id for card in client.models.list()] == ["tiny"]


def test_events_do_not_wait_for_the_acknowledgement_of_earlier_ones() -> None:
    from perceiver_ar.serving.server import listen

    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_key_covers_everything_but_health(serving: Any, run: Path) -> None:
    with serving(run, api_key="a sécret") as url:
        assert http.get(f"{url}/health").json() == {"status": "ok"}
        for path in (
            "/",
            "/v1/models",
            "/metrics",
            "/tokenizer_info",
            "/openapi.json",
            "/nothing",
            "/health/",
            "//health",
        ):
            for given in (None, "Bearer wrong", "Basic !", "Basic eA==", "a sécret", "Bearer \xe9"):
                headers = {} if given is None else {"Authorization": given.encode("latin-1")}
                assert http.get(f"{url}{path}", headers=headers).status_code == 401
        right = {"Host": "anything", "Authorization": "Bearer a sécret".encode()}
        assert http.get(f"{url}/v1/models", headers=right).is_success
        assert http.get(f"{url}/v1/models", auth=("", "a sécret")).is_success
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="plain", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="key is missing or wrong"),
        ):
            client.models.list()


def test_without_a_key_only_local_names_are_answered_and_no_other_origin(url: str) -> None:
    for host, status in (
        ("localhost:1", 200),
        ("[::1]:1", 200),
        ("127.0.0.2:1", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ):
        assert http.get(f"{url}/v1/models", headers={"Host": host}).status_code == status
    answer = http.get(f"{url}/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://LOCALHOST", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_hosts_cannot_post(url: str, origin: str, status: int) -> None:
    headers = {"Host": "localhost:8000", "Origin": origin}
    assert http.post(f"{url}/tokenize", headers=headers, json={"prompt": "a"}).status_code == status


# The command


def test_sigterm_lets_a_stream_end(run: Path) -> None:
    command = [sys.executable, "-m", "perceiver_ar", "serve", str(run), "--port", "0", "--slots", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first, address = process.stderr.readline(), process.stderr.readline().strip()
        assert first.startswith("tiny on cpu: 1 slots of 64 tokens, ")
        body = {"prompt": "secret prompt", "max_tokens": 300, "stream": True, "seed": 0}
        with http.stream("POST", f"{address}/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            seen = [next(lines)]
            process.send_signal(signal.SIGTERM)
            seen += lines
        assert seen[-1] == "data: [DONE]"
        log = process.stderr.read()
    assert "secret" not in log
    assert "Traceback" not in log


def test_what_runs_until_the_end_of_a_shutdown_is_answered(run: Path) -> None:
    from perceiver_ar.serving.server import Server, listen, load

    server, listening = Server(load(run, slots=2)), listen("127.0.0.1", 0)
    server.job_seconds = 0
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    body = {"prompt": [0], "max_tokens": 1_000_000, "seed": 0, "repetition_penalty": 0.5, "top_k": 1}

    def whole() -> Any:
        return http.post(f"{url}/v1/completions", json=body)

    def stream() -> list[str]:
        with http.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as answer:
            return [line for line in answer.iter_lines() if line.startswith("data: ")]

    with ThreadPoolExecutor(2) as pool:
        answers = pool.submit(whole), pool.submit(stream)
        until(lambda: rows_running(url) == 2, "the rows do not run")
        server.should_exit = True
        assert answers[0].result().json()["choices"][0]["finish_reason"] == "length"
        assert json.loads(answers[1].result()[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert answers[1].result()[-1] == "data: [DONE]"
    thread.join(60)
    listening.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--host", "0.0.0.0"], "give --api_key"),
        (["--api_key", ""], "api_key is empty"),
        (["--api_key", "key\n"], "api_key has white space at an end"),
        (["--slots", "0"], "slots is 0"),
        (["--max_context", "15"], "max_context is 15"),
        (["--port", "70000"], "port is 70000"),
        (["--host", "192.0.2.1", "--api_key", "x"], "cannot listen on 192.0.2.1"),
        (["--host", "a..b", "--api_key", "x"], "cannot listen on a..b"),
        (["--slots", "1000000000000"], "use fewer --slots"),
        (["--device", "nowhere"], "device is nowhere"),
    ],
)
def test_what_cannot_be_served_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert main(["serve", str(run), "--port", "0", *options]) == 2
    assert complaint in capsys.readouterr().err


# Tokens


def test_the_tokenizer_is_the_codec(url: str) -> None:
    found = http.post(f"{url}/tokenize", json={"prompt": "hé"}).json()
    assert found["tokens"] == [0, *"hé".encode()]
    assert http.post(f"{url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hé"}
    info = http.get(f"{url}/tokenizer_info").json()
    for name in ("bos_token", "eos_token"):
        body = {"prompt": info[name], "add_special_tokens": False}
        assert http.post(f"{url}/tokenize", json=body).json()["tokens"] == [0]
    assert http.post(f"{url}/detokenize", json={"tokens": [256]}).status_code == 400


def test_metrics_count(url: str, client: Any) -> None:
    client.completions.create(model="tiny", prompt="a", max_tokens=3)
    lines = http.get(f"{url}/metrics").text
    assert 'perceiver_ar_requests_total{path="/v1/completions",status="200"}' in lines
    assert "perceiver_ar_slots 4.0" in lines
    assert "perceiver_ar_first_token_seconds_count" in lines


def test_metrics_name_routes_and_no_paths_of_clients(url: str) -> None:
    http.get(f"{url}/v1/files/secretkey/x.mid")
    http.post(f"{url}/v1/files/secretkey/x.mid")
    http.post(f"{url}/invented")
    http.get(f"{url}/health", headers={"Host": "evil.example"})
    lines = http.get(f"{url}/metrics").text
    assert 'path="/v1/files/{key}/{name}",status="404"' in lines
    assert 'path="other",status="404"' in lines
    assert "secretkey" not in lines
    assert "invented" not in lines


def test_what_the_page_in_the_docs_shows_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text()
    page = page.replace("http://127.0.0.1:8000", url).replace('"books"', '"tiny"')
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    variables: dict[str, Any] = {}
    exec(compile(code, "serve.md", "exec"), variables)
    variables["client"].close()
    assert "nats" in capsys.readouterr().out
    [body] = re.findall(r"-d '(.*?)'", page)
    assert http.post(f"{url}/v1/completions", json=json.loads(body)).json()["choices"][0]["text"]
