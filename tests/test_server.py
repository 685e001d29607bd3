"""The HTTP server, over real sockets, with the real client of OpenAI."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.serving.adapter_store import AdapterStore
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.serving.scheduler import Scheduler
from lora_from_scratch.serving.server import MOST_BYTES, Server
from tests.checkpoints import TOKENIZER
from tests.helpers import tiny_model
from tests.served_adapters import METHODS, write_adapters

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

MODEL: dict[str, Any] = {"vocab_size": TOKENIZER.vocab_size, "n_positions": 128}
PROMPT = "Once upon"


@dataclass
class Running:
    """A server that listens, and the models that its adapters amount to."""

    server: Server
    port: int
    folder: Path
    models: dict[str, GPT2]

    def expected(self, name: str, prompt: str, tokens: int) -> list[int]:
        eos = TOKENIZER.eos_id
        return generate(self.models[name], [TOKENIZER.encode(prompt)], max_new_tokens=tokens, eos_id=eos)[0]

    def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(options.pop("method", "POST"), path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def get(self, path: str) -> tuple[int, Any]:
        return self.post(path, b"", method="GET")

    def metric(self, name: str) -> float:
        samples = (s for family in text_string_to_metric_families(self.get("/metrics")[1]) for s in family.samples)
        return sum(sample.value for sample in samples if sample.name == name)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    models = {"tiny": tiny_model(**MODEL), **write_adapters(folder, **MODEL)}
    model = tiny_model(**MODEL)
    store = AdapterStore(model, PagePool(PageLayout.for_model(model.config), 40), folder)
    server = Server(Scheduler(model, store, max_rows=4), TOKENIZER, "tiny", max_waiting=64, allow_updates=True)
    listening = socket.create_server(("127.0.0.1", 0))
    program = uvicorn.Server(uvicorn.Config(server.app, log_level="warning"))
    thread = threading.Thread(target=program.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Running(server, listening.getsockname()[1], folder, models)
    program.should_exit = True
    thread.join()
    assert not server.engine.is_alive


@pytest.fixture
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass takes a while, so that something can happen during a text."""
    model: Any = running.server.scheduler.model

    def wait(texts: Any) -> Any:
        time.sleep(0.02)
        return model(texts)

    monkeypatch.setattr(running.server.scheduler, "model", wait)


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


# --- OpenAI's client ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", *METHODS])
def test_the_client_gets_the_text_of_the_merged_model(running: Running, client: Any, name: str) -> None:
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=9, temperature=0)
    tokens = running.expected(name, PROMPT, 9)
    assert answer.choices[0].text == TOKENIZER.decode(tokens)
    assert answer.choices[0].finish_reason == ("length" if len(tokens) == 9 else "stop")
    assert answer.model == name
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TOKENIZER.encode(PROMPT)), len(tokens))


def test_many_clients_at_once_each_get_their_own(running: Running, client: Any) -> None:
    def ask(number: int) -> str:
        name = ["tiny", *METHODS][number % (1 + len(METHODS))]
        text = (
            client.completions.create(model=name, prompt=f"Number {number}", max_tokens=12, temperature=0)
            .choices[0]
            .text
        )
        assert text == TOKENIZER.decode(running.expected(name, f"Number {number}", 12))
        return text

    with ThreadPoolExecutor(12) as threads:
        assert len(list(threads.map(ask, range(40)))) == 40
    eventually(lambda: running.metric("lora_running") + running.metric("lora_waiting") == 0)


def test_a_stream_is_the_same_text_in_pieces(running: Running, client: Any) -> None:
    options = {"include_usage": True}
    pieces = list(
        client.completions.create(
            model="king", prompt=[PROMPT, "A fox"], max_tokens=9, temperature=0, stream=True, stream_options=options
        )
    )
    assert len(pieces) > 4
    texts, reasons = ["", ""], ["", ""]
    for piece in pieces[:-1]:
        (choice,) = piece.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    expected = [running.expected("king", prompt, 9) for prompt in (PROMPT, "A fox")]
    assert texts == [TOKENIZER.decode(tokens) for tokens in expected]
    assert reasons == ["length" if len(tokens) == 9 else "stop" for tokens in expected]
    assert pieces[-1].usage.completion_tokens == sum(map(len, expected))


def test_a_seed_repeats_what_is_sampled(client: Any) -> None:
    def ask(seed: int | None) -> str:
        return (
            client.completions.create(model="fox", prompt=[5, 6, 7], max_tokens=20, temperature=1.2, seed=seed)
            .choices[0]
            .text
        )

    assert ask(1) == ask(1)
    assert len({ask(1), ask(2), ask(None), ask(None)}) > 2


def test_a_stop_string_ends_the_text_before_it(running: Running, client: Any) -> None:
    whole = TOKENIZER.decode(running.expected("dove", PROMPT, 30))
    stop = whole[7:10]
    for stream in (False, True):
        answer = client.completions.create(
            model="dove", prompt=PROMPT, max_tokens=30, temperature=0, stop=["zzz", stop], stream=stream
        )
        choices = [piece.choices[0] for piece in (answer if stream else [answer])]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_the_client_lists_the_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", *sorted(METHODS)]
    assert client.models.retrieve("king").id == "king"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("lion")


def test_the_client_understands_the_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'lion' does not exist") as missing:
        client.completions.create(model="lion", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="more than the model's context of 128"):
        client.completions.create(model="king", prompt="x " * 100, max_tokens=100)


# --- Bad input -----------------------------------------------------------------------------------------------

GOOD = {"model": "king", "prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [TOKENIZER.vocab_size]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**9}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"x": 1}}, "stream_options"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"max_token": 3}, "max_token"),
    ],
)
def test_a_bad_field_is_named(running: Running, change: dict[str, Any], param: str) -> None:
    status, answer = running.post("/v1/completions", GOOD | change)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b"null"])
def test_a_body_that_is_no_object_is_refused(running: Running, body: bytes) -> None:
    status, answer = running.post("/v1/completions", body)
    assert status == 400
    assert "body" in answer["error"]["message"]


def test_a_body_that_is_too_large_is_refused(running: Running) -> None:
    status, answer = running.post("/v1/completions", b" " * (MOST_BYTES + 1))
    assert status == 413
    assert str(MOST_BYTES) in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/chat/completions", 404), ("GET", "/", 404)],
)
def test_what_is_not_there_is_said_in_json(running: Running, method: str, path: str, status: int) -> None:
    got, answer = running.post(path, b"", method=method)
    assert got == status
    assert path in answer["error"]["message"]


def test_a_damaged_adapter_harms_no_other(running: Running, slow: None) -> None:
    shutil.copytree(running.folder / "king", running.folder / "damaged")
    (running.folder / "damaged" / "adapter_model.safetensors").write_bytes(b"not tensors")
    with ThreadPoolExecutor(4) as threads:
        body = GOOD | {"temperature": 0, "max_tokens": 9}
        good = [threads.submit(running.post, "/v1/completions", body) for _ in range(2)]
        bad = threads.submit(running.post, "/v1/completions", body | {"model": "damaged", "stream": True})
    shutil.rmtree(running.folder / "damaged")
    status, answer = bad.result()
    assert status == 400
    assert "damaged: adapter_model.safetensors is damaged" in answer["error"]["message"]
    assert [future.result()[0] for future in good] == [200, 200]


def test_a_full_queue_is_said_to_be_full(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.server.engine, "max_waiting", -4)
    before = running.metric("lora_errors_total")
    status, answer = running.post("/v1/completions", GOOD)
    assert (status, answer["error"]["code"]) == (429, "busy")
    assert running.metric("lora_errors_total") == before + 1


def test_a_failure_of_the_server_is_one_of_the_requests_that_run(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(texts: Any) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(running.server.scheduler, "model", fail)
        status, answer = running.post("/v1/completions", GOOD)
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "luck" not in answer["error"]["message"]
    assert running.post("/v1/completions", GOOD)[0] == 200
    assert running.get("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(running: Running, slow: None, stream: bool) -> None:
    scheduler = running.server.scheduler
    body = json.dumps(GOOD | {"max_tokens": 120, "stream": stream, "temperature": 0, "prompt": "Go"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(head + body)
        eventually(lambda: any(len(request.tokens) > 2 for request in list(scheduler.running)))
        (request,) = scheduler.running
    eventually(lambda: not scheduler.running)
    assert len(request.tokens) < 120
    assert not running.server.engine.active
    assert all(not resident.users for resident in running.server.store.resident.values())


# --- Adapters ----------------------------------------------------------------------------------------------


def test_adapters_come_and_go_while_it_runs(running: Running, client: Any, tmp_path: Path) -> None:
    place = shutil.copytree(running.folder / "king", tmp_path / "elsewhere")
    assert running.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(place)})[0] == 200
    shutil.copytree(running.folder / "fox", running.folder / "copied")
    for name, same in (("new", "king"), ("copied", "fox")):
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=9, temperature=0)
        assert answer.choices[0].text == TOKENIZER.decode(running.expected(same, PROMPT, 9))
    assert running.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    shutil.rmtree(running.folder / "copied")
    for name in ("new", "copied"):
        assert running.post("/v1/completions", GOOD | {"model": name})[0] == 404
        assert running.post("/v1/unload_lora_adapter", {"lora_name": name})[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"lora_name": "x"}, 400),
        ({"lora_name": "x", "lora_path": "/nowhere"}, 400),
        ({"lora_name": "tiny", "lora_path": "king"}, 400),
        ({"lora_name": "../x", "lora_path": "king"}, 400),
    ],
)
def test_what_cannot_be_loaded_is_refused(running: Running, body: dict[str, str], status: int) -> None:
    if body.get("lora_path") == "king":
        body = body | {"lora_path": str(running.folder / "king")}
    got, answer = running.post("/v1/load_lora_adapter", body)
    assert got == status
    assert answer["error"]["message"]


def test_clients_may_update_only_where_it_is_allowed() -> None:
    model = tiny_model(**MODEL)
    store = AdapterStore(model, PagePool(PageLayout.for_model(model.config), 2))
    app = Server(Scheduler(model, store), TOKENIZER, "tiny").app
    assert not any("lora" in str(getattr(route, "path", "")) for route in app.routes)
    store.close()


# --- For those who run it ------------------------------------------------------------------------------------


def test_the_metrics_count_what_happens(running: Running, client: Any) -> None:
    names = ("lora_generated_tokens_total", "lora_completions_total", "lora_prompt_tokens_total")
    before = [running.metric(name) for name in names]
    answer = client.completions.create(model="wolf", prompt=PROMPT, max_tokens=9, temperature=0)
    used = answer.usage
    after = [running.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [used.completion_tokens, 1, used.prompt_tokens]
    assert running.metric("lora_pool_pages") == 40
    assert running.metric("lora_adapters_resident") >= 1
    assert running.metric("lora_completion_seconds_count") == after[1]
