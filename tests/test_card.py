"""A run's card says what the run says; what goes to the Hub is a whole run; what goes wrong is one line.

The Hub is a server of our own on this machine that speaks the part of its interface that a small upload needs.
"""

import base64
import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, assert_refused, content
from huggingface_hub import ModelCard
from processes import Server

from perceiver_ar import PerceiverAR, PerceiverARConfig, Run
from perceiver_ar.card import push, shared_files, write_card
from perceiver_ar.cli import main
from perceiver_ar.errors import InputError


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(corpus), "--out", str(run), *SMALL, "--data.bpe_vocab_size=300", "--max_steps=5"]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_the_card_says_what_was_measured_in_a_form_that_the_hub_reads(run: Path) -> None:
    assert write_card(Run(run), "me/books")
    card, summary = ModelCard.load(run / "README.md"), json.loads((run / "summary.json").read_text())
    data: Any = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("perceiver-ar", "text-generation", None)
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert set(results) == {"bits_per_byte", "bits_per_token", "nats_per_token"}
    for name, value in results.items():
        assert value == pytest.approx(summary[name], abs=1e-4)
        assert f"{summary[name]:.4f}" in card.text
    assert "1 of cross-attention, 1 of self-attention" in card.text
    assert f"{Run(run).codec().vocab_size} ids" in card.text


def test_a_card_that_is_there_stays(run: Path) -> None:
    (run / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert not write_card(Run(run), "me/books")
    assert (run / "README.md").read_text() == "---\nlicense: mit\n---\nMine.\n"


def test_a_model_without_a_codec_or_a_summary_has_a_card(tmp_path: Path) -> None:
    config = PerceiverARConfig(vocab_size=9, context_length=8, num_latents=4, dim=8, num_layers=1, num_heads=1)
    PerceiverAR(config).save_pretrained(tmp_path)
    assert write_card(Run(tmp_path), "me/converted")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.get("eval_results") is None and 'Run.open("converted").model()' in card.text
    assert shared_files(Run(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


def test_figures_that_a_summary_lacks_are_left_out(run: Path) -> None:
    (run / "summary.json").write_text(
        '{"steps": 5, "bits_per_byte": 2.5, "nats_per_token": NaN, "bits_per_token": "?"}'
    )
    assert write_card(Run(run), "me/books")
    card = ModelCard.load(run / "README.md")
    data: Any = card.data
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("bits_per_byte", 2.5)]
    assert "| bits per byte | 2.5000 |" in card.text and "per token" not in card.text


def test_what_the_card_shows_runs_with_the_files_that_are_pushed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(Run(run), "me/books")
    files = shared_files(Run(run))
    assert files == ["README.md", "codec.json", "config.json", "model.safetensors", "recipe.yaml", "report.html",
                     "summary.json", "tokenizer.json"]  # fmt: skip
    (tmp_path / "books").mkdir()
    for name in files:
        shutil.copy(run / name, tmp_path / "books" / name)
    text = (run / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    download, *commands = re.findall(r"^(?:hf|perceiver-ar) .*", text, flags=re.MULTILINE)
    assert download == "hf download me/books --local-dir books" and len(commands) == 2
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


# The Hub.


class Hub(ThreadingHTTPServer):
    """Takes one commit, of files that it wants in the commit itself, or refuses everything with `status`."""

    def __init__(self, status: int = 200, public: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.status, self.public = status, public
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer({"id": "me/books", "private": not self.server.public})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{self.server.address}/me/books"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/me/books/commit/1", "commitOid": "1"})

    def answer(self, content: Any) -> None:
        ok = self.server.status == 200
        data = json.dumps(content if ok else {"error": "you may not"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    with Hub(**getattr(request, "param", {})) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


PUSH = """
import os, sys
from perceiver_ar.cli import main

assert "huggingface_hub" not in sys.modules  # which reads its settings at import
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[name]
os.environ.update(variables)
sys.exit(main(argv))
"""


def pushed(
    server: Server, run: Path, *options: str, home: Path, address: str, token: str | None = "hf_secret"
) -> tuple[int, str, str]:
    """Exit status, stdout and the last line of stderr of the command."""
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {})
    argv = ["push", str(run), "me/books", *options]
    status = server.run(code=PUSH, given={"variables": variables, "argv": argv})
    return status, server.stdout.read_text(), server.messages()[-1]


def test_a_run_is_pushed_whole_in_one_commit(server: Server, run: Path, tmp_path: Path, hub: Hub) -> None:
    status, shown, _ = pushed(server, run, "--private", home=tmp_path / "home", address=hub.address)
    assert (status, shown) == (0, f"{hub.address}/me/books\n")
    assert hub.created["visibility"] == "private"
    assert hub.files == {name: data for name, data in content(run).items() if name in shared_files(Run(run))}


@pytest.mark.parametrize("hub", [{"public": True}], indirect=True)
def test_what_is_meant_to_be_private_does_not_go_to_a_public_place(
    server: Server, run: Path, tmp_path: Path, hub: Hub
) -> None:
    status, shown, message = pushed(server, run, "--private", home=tmp_path / "home", address=hub.address)
    assert (status, shown, hub.files) == (2, "", {}) and "already exists and is public" in message


@pytest.mark.parametrize("hub", [{"status": 403}], indirect=True)
def test_a_hub_that_refuses_is_one_line(server: Server, run: Path, tmp_path: Path, hub: Hub) -> None:
    status, shown, message = pushed(server, run, home=tmp_path / "home", address=hub.address)
    assert (status, shown) == (2, "") and message.startswith("perceiver-ar: me/books: the Hub did not accept the run")
    assert "you may not" in message


def test_without_a_token_or_a_hub_nothing_is_pushed(server: Server, run: Path, tmp_path: Path) -> None:
    status, shown, message = pushed(server, run, home=tmp_path / "home", address="http://127.0.0.1:9", token=None)
    assert (status, shown) == (2, "") and "me/books needs a token: run `hf auth login`, or set HF_TOKEN" in message
    status, shown, message = pushed(server, run, home=tmp_path / "home", address="http://127.0.0.1:9")
    assert (status, shown) == (2, "") and "the Hub did not accept the run (" in message


@pytest.mark.parametrize("repo_id", ["books", "me/books/more", "me/..books", "me/bo oks", "", "/"])
def test_what_is_no_name_on_the_hub_is_refused(run: Path, repo_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "push", run, repo_id, "--dry_run", says=f"{repo_id!r} ")
    assert not (run / "README.md").exists()
    with pytest.raises(InputError, match="OWNER/NAME"):
        push(Run(run), repo_id)


def test_a_dry_run_shows_what_would_be_pushed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["push", str(run), "me/books", "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == shared_files(Run(run)) and "add a licence" in captured.err


def test_weights_in_shards_are_pushed(run: Path) -> None:
    from perceiver_ar.huggingface import PerceiverARForCausalLM

    PerceiverARForCausalLM.from_pretrained(run).save_pretrained(run, max_shard_size="5KB")
    shards = {path.name for path in run.glob("model*safetensors*")}
    assert len(shards) > 2 and "model.safetensors" not in shards and shards <= set(shared_files(Run(run)))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_run_that_cannot_be_used_is_not_pushed(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "README.md").write_text("Mine.")
    (run / name).unlink()
    with pytest.raises(InputError, match=name):
        shared_files(Run(run))
