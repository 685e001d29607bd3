"""The command `serve` as a process of its own: it starts, answers a crowd, and stops without losing anything."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.cli import main
from lora_from_scratch.gpt2.checkpoint import save_gpt2
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.models.checkpoint import load_language_model
from tests.any_models import randomise
from tests.checkpoints import TOKENIZER
from tests.helpers import tiny_model
from tests.served_adapters import METHODS, write_adapters
from tests.test_any_language_model import make_directory

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

MODEL: dict[str, Any] = {"vocab_size": TOKENIZER.vocab_size, "n_positions": 256}


class Served:
    """The server, and the models that its adapters amount to."""

    def __init__(self, folder: Path, models: dict[str, GPT2], *flags: str) -> None:
        self.folder, self.models = folder, models
        command = [
            "-m",
            "lora_from_scratch",
            "serve",
            "--model",
            str(folder / "tiny"),
            "--adapters",
            str(folder / "all"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", "--pool", "1", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.address = next(word for word in line.split() if word.startswith("http")) + "/completions"

    def expected(self, name: str, prompt: str, tokens: int) -> str:
        ids = TOKENIZER.encode(prompt)
        return TOKENIZER.decode(generate(self.models[name], [ids], max_new_tokens=tokens, eos_id=TOKENIZER.eos_id)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, GPT2]]:
    place = tmp_path_factory.mktemp("serve")
    model = tiny_model(**MODEL)
    save_gpt2(model, TOKENIZER, place / "tiny")
    return place, {"tiny": model, **write_adapters(place / "all", **MODEL)}


@pytest.fixture
def served(folder: tuple[Path, dict[str, GPT2]]) -> Iterator[Served]:
    server = Served(*folder)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.mark.slow
def test_a_server_that_is_stopped_finishes_what_runs(served: Served) -> None:
    body = {"model": "king", "prompt": "A queen", "max_tokens": 200, "temperature": 0, "stream": True}
    text = ""
    with httpx.stream("POST", served.address, json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                break
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if served.process.poll() is None and len(text) > 5:
                served.process.send_signal(signal.SIGTERM)
        else:
            pytest.fail("the stream has no end")
    assert text == served.expected("king", "A queen", 200)
    assert served.process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert "Traceback" not in served.process.stderr.read()  # type: ignore[union-attr]
    with pytest.raises(httpx.ConnectError):
        httpx.post(served.address, json=body)


@pytest.mark.slow
def test_a_thousand_clients_at_once_are_answered_or_told_to_come_back(served: Served) -> None:
    names = ["tiny", *METHODS]

    async def ask_all() -> list[Any]:
        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
            bodies = [
                {"model": names[n % len(names)], "prompt": f"{n % 20}", "max_tokens": 5, "temperature": 0}
                for n in range(1000)
            ]
            return await asyncio.gather(*(client.post(served.address, json=body) for body in bodies))

    answers = asyncio.run(ask_all())
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 256
    for number, answer in enumerate(answers):
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["text"]
            assert text == served.expected(names[number % len(names)], f"{number % 20}", 5)
        else:
            assert answer.json()["error"]["code"] == "busy"
            assert answer.headers["Retry-After"] == "1"
    assert httpx.get(served.address.replace("v1/completions", "health")).json() == {"status": "ok"}


def ask_for_ever(served: Served) -> None:
    while True:
        httpx.post(served.address, json={"model": "fox", "prompt": "A", "max_tokens": 100}, timeout=60)


@pytest.mark.slow
def test_a_server_that_is_killed_starts_again(served: Served) -> None:
    threading.Timer(0.3, served.process.kill).start()
    with pytest.raises(httpx.TransportError):
        ask_for_ever(served)
    served.process.wait()
    again = Served(served.folder, served.models)
    try:
        body = {"model": "fox", "prompt": "A", "max_tokens": 9, "temperature": 0}
        text = httpx.post(again.address, json=body, timeout=60).json()["choices"][0]["text"]
        assert text == again.expected("fox", "A", 9)
    finally:
        again.process.kill()
        again.process.wait()


@pytest.mark.slow
def test_a_llama_and_its_adapters_are_served(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base = make_directory("llama", tmp_path / "tiny")
    model, tokenizer = load_language_model(base)
    method = LoRA(rank=2, alpha=4)
    method.adapt(model)
    randomise(method.trainable(model))
    method.save(model, tmp_path / "all" / "king")
    served = Served(tmp_path, {})
    try:
        body = {"model": "king", "prompt": "A queen", "max_tokens": 20, "temperature": 0}
        text = httpx.post(served.address, json=body, timeout=60).json()["choices"][0]["text"]
    finally:
        served.process.kill()
        served.process.wait()
    ids = tokenizer.encode("A queen")
    assert text == tokenizer.decode(generate(model, [ids], max_new_tokens=20, eos_id=tokenizer.eos_id)[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "--rows must be at least 1"),
        (["--waiting", "-1"], "--waiting must be at least 0"),
        (["--adapters", "/nowhere"], "no directory of adapters /nowhere"),
        (["--pool", "1", "--host", "256.0.0.1", "--port", "1"], "cannot listen at 256.0.0.1, port 1"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_flags_are_named(
    folder: tuple[Path, dict[str, GPT2]], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["serve", "--model", str(folder[0] / "tiny"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1
