"""Serve embeddings with Ray Serve: all-MiniLM-L6-v2 in int8, batches by their number of tokens.

    python examples/ray_serve.py                      # POST /embed, GET /health on port 8000
    python examples/ray_serve.py --load               # int8 and float under the same load
    curl -d '{"texts": ["A bird never forgets a face."]}' http://127.0.0.1:8000/embed
    pip install 'graphquant[ray,recipes]'             # what it needs

A batch is closed when the next text would bring it over --max-tokens, or after --wait-ms. A
replica takes no requests before it has compiled for all sizes. Ray exports the metrics, on a port
of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

try:
    import aiohttp
    import ray
    from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
    from ray import serve
    from ray.serve import metrics
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
except ImportError as error:
    sys.exit(f"This example needs Ray Serve ({error}): pip install 'graphquant[ray]'")

import numpy as np
import torch
from ray_embed import Encoder, init_here, make_corpus, positive
from rich.console import Console
from rich.table import Table

KINDS = ("float", "bfloat16", "int8")
MAX_TEXTS = 64  # of one request
MAX_BODY = 2**20  # bytes of one request
MAX_LENGTH = 256  # tokens of one text, which is what the model was made for
WARM_BATCH = 32  # sentences


# The service --------------------------------------------------------------------------------------


class Texts(BaseModel):
    """What POST /embed takes."""

    model_config = ConfigDict(extra="forbid")
    texts: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]]


class Refused(Exception):
    """A request that gets a 4xx answer, which says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def tokens_of(batch: list[list[int]]) -> int:
    """The size of a batch for Ray Serve: its tokens. There are no others without padding."""
    return sum(map(len, batch))


@serve.deployment
class Embeddings:
    """One replica.

    max_tokens  of a batch; at least MAX_LENGTH
    wait_s      how long a batch that is not full waits for more
    """

    def __init__(
        self, kind: str, device: str, threads: int, inner: str, max_tokens: int, wait_s: float
    ) -> None:
        # One thread computes, so that requests are read while it does. It compiles too:
        # torch.set_num_threads holds for the thread that calls it.
        self.computes = ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(threads,)
        )
        self.encoder = Encoder(kind, device, threads, inner)
        self.embed_batch.set_max_batch_size(max_tokens)
        self.embed_batch.set_batch_wait_timeout_s(wait_s)
        self.count(max_tokens)
        # Serve sends requests once this has returned and check_health has passed.
        self.warm_up_s = self.computes.submit(self.encoder.warm_up, WARM_BATCH).result()

    def count(self, max_tokens: int) -> None:
        """The metrics, beside those that Ray Serve has of every deployment."""
        powers = [float(2**i) for i in range(13)]
        self.requests = metrics.Counter("embed_requests", "requests by status", ("status",))
        self.tokens = metrics.Counter("embed_tokens", "tokens that were embedded")
        self.latency = metrics.Histogram("embed_latency_ms", "of requests", powers)
        self.batch_texts = metrics.Histogram("embed_batch_texts", "texts of a batch", powers)
        bounds = sorted({*(n for n in powers if n < max_tokens), float(max_tokens)})
        self.batch_tokens = metrics.Histogram("embed_batch_tokens", "tokens of a batch", bounds)

    async def check_health(self) -> None:
        """Ray Serve calls it; it replaces the replica when this raises several times."""
        (vector,) = await self.compute([[101, 102]])
        if not np.isfinite(vector).all():
            raise RuntimeError("the model computes NaN")

    async def compute(self, ids: list[list[int]]) -> np.ndarray:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.computes, self.encoder.embed, ids)

    @serve.batch(max_batch_size=4096, batch_wait_timeout_s=0.005, batch_size_fn=tokens_of)
    async def embed_batch(self, ids: list[list[int]]) -> list[np.ndarray]:
        self.batch_texts.observe(len(ids))
        self.batch_tokens.observe(tokens_of(ids))
        self.tokens.inc(tokens_of(ids))
        return list(await self.compute(ids))

    async def __call__(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            answer = await self.answer(request)
        except Refused as refused:
            answer = JSONResponse({"error": str(refused)}, refused.status)
        self.requests.inc(tags={"status": str(answer.status_code)})
        self.latency.observe(1e3 * (time.perf_counter() - start))
        return answer

    async def answer(self, request: Request) -> Response:
        match request.method, request.url.path.removeprefix(request.scope.get("root_path", "")):
            case "GET", "/health":
                int8 = max((report.coverage for report in self.encoder.reports), default=0)
                said = {"status": "ok", "warm_up_s": self.warm_up_s, "int8": int8}
                return JSONResponse(said)
            case "POST", "/embed":
                ids = await self.read(request)
                vectors = await asyncio.gather(*map(self.embed_batch, ids))
                made = {"embeddings": [v.tolist() for v in vectors], "tokens": list(map(len, ids))}
                return JSONResponse(made)
            case _, "/health" | "/embed":
                raise Refused(405, f"{request.method} is not for this path")
        raise Refused(404, "there are POST /embed and GET /health")

    async def read(self, request: Request) -> list[list[int]]:
        """The token ids of each text. Nothing is cut: what is too long is refused."""
        body = await request.body()
        if len(body) > MAX_BODY:
            raise Refused(413, f"the request has {len(body)} bytes; {MAX_BODY} are allowed")
        try:
            texts = Texts.model_validate_json(body).texts
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            raise Refused(400, f'{where}: {first["msg"]}; send {{"texts": ["..."]}}') from error
        if not 0 < len(texts) <= MAX_TEXTS:
            raise Refused(413 if texts else 400, f"{len(texts)} texts; send 1 to {MAX_TEXTS}")
        ids = self.encoder.tokenize(texts, cut=False)
        for i, one in enumerate(ids):
            if len(one) > MAX_LENGTH:
                why = f"texts.{i} has {len(one)} tokens; the model reads {MAX_LENGTH}"
                raise Refused(413, why)
        return ids


def application(args: argparse.Namespace, kind: str) -> serve.Application:
    ready = Embeddings.options(
        num_replicas=args.replicas,
        max_ongoing_requests=args.max_ongoing,
        max_queued_requests=args.max_ongoing,  # more are answered with a 503
        ray_actor_options={
            "num_cpus": args.threads,
            "num_gpus": int(args.device == "cuda"),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(args.threads)}},
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return ready.bind(
        kind, args.device, args.threads, args.inner, args.max_tokens, args.wait_ms / 1e3
    )


# The load -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What one load gave: the latencies of answered requests in ms, the seconds from the first
    request to the last answer, and how many were not answered with 200."""

    latencies: list[float]
    seconds: float
    failed: int

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, p: int) -> float:
        if len(self.latencies) < 2:
            return float("nan")
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[p - 1]


class Client:
    """Sends one text a request, and takes down when it should have been sent and was answered."""

    def __init__(self, session: aiohttp.ClientSession, url: str, texts: Sequence[str]) -> None:
        self.session, self.url, self.texts = session, url, texts
        self.latencies: list[float] = []
        self.failed = self.sent = 0

    async def ask(self, since: float) -> None:
        text = self.texts[self.sent % len(self.texts)]
        self.sent += 1
        try:
            async with self.session.post(self.url, json={"texts": [text]}) as answer:
                await answer.read()
                good = answer.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            good = False
        if good:
            self.latencies.append(1e3 * (time.perf_counter() - since))
        else:
            self.failed += 1


async def closed_loop(client: Client, clients: int, seconds: float) -> None:
    """`clients` that each send the next request when the last one is answered."""
    end = time.perf_counter() + seconds

    async def one() -> None:
        while (now := time.perf_counter()) < end:
            await client.ask(now)

    await asyncio.gather(*(one() for _ in range(clients)))


async def open_loop(client: Client, rate: float, seconds: float) -> None:
    """`rate` requests a second at random times, whether or not the earlier ones are answered. A
    latency counts from the time at which the request was due, also if it was sent later."""
    rng = random.Random(0)
    due = start = time.perf_counter()
    tasks = []
    while (due := due + rng.expovariate(rate)) < start + seconds:
        await asyncio.sleep(due - time.perf_counter())
        tasks.append(asyncio.create_task(client.ask(due)))
    await asyncio.gather(*tasks)


async def measure(
    url: str, texts: Sequence[str], load: Callable[[Client], Awaitable[None]]
) -> Load:
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=256)  # the most requests under way
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = Client(session, url, texts)
        start = time.perf_counter()
        await load(client)
        return Load(client.latencies, time.perf_counter() - start, client.failed)


def run_load(args: argparse.Namespace, url: Callable[[str], str]) -> Table:
    """Every kind under each load in turns, so that whatever else the machine does meets all."""
    texts = make_corpus(512)
    table = Table(title=f"{args.replicas} replica, {args.threads} threads, {args.seconds:g} s each")
    for name in ("load", "model", "answered/s", "p50 ms", "p99 ms", "failed"):
        table.add_column(name, justify="left" if name in ("load", "model") else "right")

    def row(name: str, kind: str, load: Callable[[Client], Awaitable[None]]) -> Load:
        found = asyncio.run(measure(url(kind), texts, load))
        cells = (found.percentile(50), found.percentile(99))
        table.add_row(
            *(name, kind, f"{found.rate:.1f}", *(f"{c:.1f}" for c in cells), str(found.failed))
        )
        return found

    kinds = KINDS if args.device == "cpu" else ("float", "int8")
    floats: list[float] = []
    for clients in args.clients:
        for kind in kinds:
            found = row(
                f"{clients} at a time", kind, lambda c, n=clients: closed_loop(c, n, args.seconds)
            )
            if kind == "float":
                floats.append(found.rate)
        table.add_section()
    for rate in args.rates or [round(max(floats) * share, 1) for share in (0.5, 0.9, 1.5)]:
        for kind in kinds:
            row(f"{rate:g} requests/s", kind, lambda c, r=rate: open_loop(c, r, args.seconds))
        table.add_section()
    return table


# The program --------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve embeddings in int8 with Ray Serve.")
    parser.add_argument("--port", type=positive, default=8000)
    parser.add_argument("--replicas", type=positive, default=1)
    parser.add_argument("--threads", type=positive, default=1, help="of each replica")
    parser.add_argument("--max-tokens", type=positive, default=2048, help="of a batch")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="of a batch that is not full")
    parser.add_argument("--max-ongoing", type=positive, default=256, help="requests of a replica")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--load", action="store_true", help="measure int8 beside float, then end")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 16], help="closed loop")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="open loop (default: 0.5, 0.9, 1.5 of float's most)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    args = parser.parse_args(argv)
    if args.max_tokens < MAX_LENGTH:
        parser.error(f"--max-tokens {args.max_tokens}: one text may have {MAX_LENGTH}")
    return args


def start(args: argparse.Namespace) -> None:
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    apps = len(KINDS) if args.load else 1
    init_here(apps * args.replicas * args.threads)  # of which one at a time computes
    serve.start(
        http_options={"host": "127.0.0.1", "port": args.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False)
    try:
        start(args)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Ctrl-C; Ray's own would abort
        if args.load:
            for kind in KINDS if args.device == "cpu" else ("float", "int8"):
                serve.run(application(args, kind), name=kind, route_prefix=f"/{kind}")
            base = f"http://127.0.0.1:{args.port}"
            console.print(run_load(args, lambda kind: f"{base}/{kind}/embed"))
        else:
            serve.run(application(args, "int8"))
            exported = ray.nodes()[0]["MetricsExportPort"]
            print(f"ready on port {args.port}, metrics on port {exported}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:  # a replica did not start
        print(f"ray_serve.py: {error}", file=sys.stderr)
        return 1
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
