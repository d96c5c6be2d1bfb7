"""examples/ray_serve.py: batches by tokens, clear refusals, metrics; ready once it has compiled."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from tests.examples.ray_programs import imported, started

MAX_TOKENS = 256


@pytest.fixture(scope="module")
def program() -> Any:
    return imported("ray_serve")


@dataclass
class Server:
    url: str
    metrics_url: str
    before: list[int | None]  # answers of GET /health until the first 200; None: no answer in 0.5 s
    health: dict[str, Any]  # that first answer with 200

    def post(self, body: bytes, path: str = "/embed") -> tuple[int, dict[str, Any]]:
        return ask(Request(self.url + path, body))

    def embed(self, *texts: str) -> np.ndarray:
        status, said = self.post(json.dumps({"texts": texts}).encode())
        assert status == 200, said
        return np.array(said["embeddings"])

    def metrics(self) -> dict[str, float]:
        """{name{status or bound}: value} of the example's own metrics, as Prometheus reads them."""
        with urlopen(self.metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("ray_embed_"):
                name, _, rest = line.partition("{")
                labels, _, value = rest.rpartition("}")
                label = re.search(r'\b(?:status|le)="([^"]+)"', labels)
                found[f"{name}{{{label[1]}}}" if label else name] = float(value)
        return found

    def metrics_until(self, ready: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """They are exported once a second."""
        deadline = time.monotonic() + 20
        while not ready(found := self.metrics()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def metrics_at_rest(self) -> dict[str, float]:
        """After two more exports: of one moment, counters and histograms come one by one."""
        time.sleep(2.5)
        return self.metrics()


def ask(request: Request | str, timeout: float = 60) -> tuple[int, dict[str, Any]]:
    try:
        with urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_health(url: str, process: subprocess.Popen[str]) -> tuple[list[int | None], Any]:
    before: list[int | None] = []
    while process.poll() is None:
        try:
            status, said = ask(f"{url}/health", timeout=0.5)
        except ConnectionRefusedError:
            status, said = 0, {}
        except (TimeoutError, json.JSONDecodeError):
            status, said = None, {}
        except URLError as error:
            status, said = 0 if isinstance(error.reason, ConnectionRefusedError) else None, {}
        if status == 200:
            return before, said
        before.append(status)
        time.sleep(0.2)
    raise AssertionError(f"the server ended: {process.stdout and process.stdout.read()}")


@pytest.fixture(scope="module")
def server(program: Any) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ("--port", port, "--max-tokens", MAX_TOKENS, "--wait-ms", 50)
    process = started("ray_serve.py", *words)
    try:
        before, health = wait_for_health(url, process)
        exported = next(m[1] for line in process.stdout if (m := re.search(r"port (\d+)$", line)))
        yield Server(url, f"http://127.0.0.1:{exported}/metrics", before, health)
    finally:
        process.send_signal(signal.SIGTERM)  # a shell's background jobs ignore SIGINT
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_it_is_not_healthy_before_it_has_compiled(server: Server) -> None:
    assert None in server.before, "it was reached, and did not answer yet"
    assert server.health["status"] == "ok" and server.health["int8"] == 1.0
    assert server.health["warm_up_s"] > 0.5
    _, later = ask(f"{server.url}/health")
    assert later == server.health, "no further warm-up, no further compilation"


def test_embeddings_are_those_of_the_float_model(server: Server, program: Any) -> None:
    from sentence_transformers import SentenceTransformer

    texts = program.make_corpus(24)
    got = server.embed(*texts)
    model = SentenceTransformer(str(imported("ray_embed").get_model_path()), device="cpu")
    assert model.max_seq_length == program.MAX_LENGTH
    same = (got * model.encode(texts, show_progress_bar=False)).sum(1)
    assert 0.99 < same.min() < 1 - 1e-5
    # alone or with others: without padding a sentence has the same bits in every batch
    assert (server.embed(texts[7])[0] == got[7]).all()


def test_a_batch_closes_at_its_number_of_tokens(server: Server) -> None:
    """64 texts of 34 tokens at once: at most 7 of them have room in a batch of 256 tokens."""
    count, total = "ray_embed_batch_texts_count", "ray_embed_tokens_total"
    server.embed("so that there is a first batch")
    server.metrics_until(lambda m: count in m)
    before = server.metrics_at_rest()
    text = " ".join(["bird"] * 32)
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda _: server.embed(text, text, text, text), range(16)))
    server.metrics_until(lambda m: m[total] >= before[total] + 64 * 34)
    now = server.metrics_at_rest()
    assert now[total] == before[total] + 64 * 34
    batches = now[count] - before[count]
    assert 64 / 7 <= batches <= 32, "more than one text in a batch, and never more than 7"
    every = now["ray_embed_batch_tokens_count"]
    assert now[f"ray_embed_batch_tokens_bucket{{{MAX_TOKENS}.0}}"] == every == now[count]


LONG = " ".join(["bird"] * 300)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("these are no words of JSON", 400, "the body: Invalid JSON"),
        ("[]", 400, "the body: Input should be an object"),
        ('{"text": "a"}', 400, "texts: Field required"),
        ('{"texts": "a"}', 400, "texts: Input should be a valid array"),
        ('{"texts": [1]}', 400, "texts.0: Input should be a valid string"),
        ('{"texts": ["a"], "model": "x"}', 400, "model: Extra inputs are not permitted"),
        ('{"texts": []}', 400, "0 texts; send 1 to 64"),
        ('{"texts": ["a", "  "]}', 400, "texts.1: String should have at least 1 character"),
        (json.dumps({"texts": ["a"] * 65}), 413, "65 texts; send 1 to 64"),
        (json.dumps({"texts": ["a", LONG]}), 413, "texts.1 has 302 tokens; the model reads 256"),
        (json.dumps({"texts": ["a" * 2**20]}), 413, "1048576 are allowed"),
    ],
)
def test_a_bad_request_is_told_why(server: Server, body: str, status: int, said: str) -> None:
    got, answer = server.post(body.encode())
    assert got == status and said in answer["error"]


def test_other_paths_and_methods(server: Server) -> None:
    assert ask(f"{server.url}/elsewhere")[0] == 404
    assert ask(f"{server.url}/embed")[0] == 405
    assert server.post(b"{}", "/health")[0] == 405


def test_requests_are_counted_by_status(server: Server) -> None:
    name = "ray_embed_requests_total{%d}"
    server.embed("so that there is a first request")
    server.metrics_until(lambda m: name % 200 in m)
    before = server.metrics_at_rest()
    for _ in range(5):
        server.embed("A bird never forgets a face.")
    for _ in range(3):
        server.post(b"{")
    good, bad = before[name % 200] + 5, before.get(name % 400, 0) + 3
    server.metrics_until(lambda m: m[name % 200] >= good and m.get(name % 400, 0) >= bad)
    now = server.metrics_at_rest()
    assert (now[name % 200], now[name % 400]) == (good, bad)
    answered = sum(n for key, n in now.items() if key.startswith("ray_embed_requests_total"))
    assert now["ray_embed_latency_ms_count"] == answered
    assert now["ray_embed_latency_ms_sum"] > 0


def test_the_load_client_counts_what_is_answered(server: Server, program: Any) -> None:
    texts = ["A bird never forgets a face."]

    def measured(load: Callable[[Any], Any], path: str = "/embed") -> Any:
        return asyncio.run(program.measure(server.url + path, texts, load))

    closed = measured(lambda client: program.closed_loop(client, 4, 2.0))
    assert closed.failed == 0 and len(closed.latencies) > 4
    assert 0 < closed.percentile(50) <= closed.percentile(99) <= max(closed.latencies)
    assert closed.rate == len(closed.latencies) / closed.seconds

    opened = measured(lambda client: program.open_loop(client, 10, 2.0))
    again = measured(lambda client: program.open_loop(client, 10, 2.0), "/elsewhere")
    assert opened.failed == 0 and len(opened.latencies) == again.failed > 8, "the same times"
    assert not again.latencies and np.isnan(again.percentile(50))


def test_an_open_loop_counts_the_time_that_a_request_waits_to_be_sent(program: Any) -> None:
    """A server that answers nothing for a second: latencies count from when requests were due."""

    class Blocked:
        def __init__(self) -> None:
            self.sent: list[float] = []
            self.latencies: list[float] = []

        async def ask(self, since: float) -> None:
            if not self.sent:  # the client itself is late
                time.sleep(1)
            self.sent.append(since)
            self.latencies.append(time.perf_counter() - since)

    client = Blocked()
    asyncio.run(program.open_loop(client, 20.0, 0.9))
    assert len(client.latencies) > 5
    assert sum(latency > 0.2 for latency in client.latencies) >= 5


def test_a_batch_without_room_for_one_text_is_refused(program: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        program.main(["--max-tokens", "64"])
    assert "--max-tokens 64: one text may have 256" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_has_each_model_under_each_load(program: Any) -> None:
    words = ("--load", "--seconds", 2, "--clients", 2, "--rates", 8, "--port", free_port())
    process = started("ray_serve.py", *words)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    for load in ("2 at a time", "8 requests/s"):
        for kind in program.KINDS:
            (row,) = re.findall(rf"{load} +│ {kind} +│(.*)", said)
            rate, p50, p99, failed, *_ = (cell.strip() for cell in row.split("│"))
            assert float(rate) > 0 and 0 < float(p50) <= float(p99) and failed == "0"
