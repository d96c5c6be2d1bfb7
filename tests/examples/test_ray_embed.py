"""examples/ray_embed.py: each id once, whatever is killed; and the embeddings are the model's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.ray_programs import EXAMPLES, imported, started

SENTENCES, PART = 200, 10
PARTS = SENTENCES // PART
WORDS = ("--sentences", SENTENCES, "--part", PART, "--batch", 8, "--compare", 0)
DONE = re.compile(r"part (\d+) by actor (\d+): ")


@pytest.fixture(scope="module")
def program() -> Any:
    return imported("ray_embed")


@dataclass
class Runs:
    """A run that was killed as a whole, and the next one, in which an actor was killed."""

    output: Path
    kept: dict[str, int]  # {file: when it was written} after the first run
    lines: list[str]  # what the second run printed
    victim: int  # the process id of the actor
    code: int  # of the second run


@pytest.fixture(scope="module")
def runs(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    output = tmp_path_factory.mktemp("ray") / "out"
    first = started("ray_embed.py", *WORDS, "--output", output, "--actors", 1)
    actor = next(int(found[2]) for line in first.stdout if (found := DONE.match(line)))
    first.kill()  # SIGKILL: nothing of it can tidy up
    first.communicate()
    wait_for_the_end(actor, output)
    (output / ".part-000019.half-written").write_bytes(b"PAR1")
    kept = written(output)

    second = started("ray_embed.py", *WORDS, "--output", output, "--actors", 2)
    lines, victim = [], 0
    for line in second.stdout:
        lines.append(line.rstrip())
        if (found := DONE.match(line)) and not victim:
            victim = int(found[2])
            os.kill(victim, signal.SIGKILL)
    return Runs(output, kept, lines, victim, second.wait())


def wait_for_the_end(actor: int, output: Path) -> None:
    """Ray's processes end by themselves some seconds after the driver, and may write a part."""
    deadline = time.monotonic() + 60
    before: dict[str, int] | None = None
    while Path(f"/proc/{actor}").exists() or before != (before := written(output)):
        assert time.monotonic() < deadline, "the actor outlives the run"
        time.sleep(1)


def written(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}


def test_a_killed_actor_loses_and_repeats_nothing(runs: Runs) -> None:
    import pyarrow.parquet as pq

    assert runs.code == 0, runs.lines
    ids = pq.read_table(runs.output, columns=["id"])["id"].to_pylist()
    assert sorted(ids) == list(range(SENTENCES))
    done = [(int(m[1]), int(m[2])) for m in map(DONE.match, runs.lines) if m]
    assert runs.victim and len({actor for _, actor in done}) >= 2
    assert {part for part, _ in done} == missing(runs), "by the actors that were left"


def missing(runs: Runs) -> set[int]:
    return {i for i in range(PARTS) if f"part-{i:06}.parquet" not in runs.kept}


def test_a_run_after_a_killed_one_embeds_what_is_missing(runs: Runs) -> None:
    assert 1 <= len(runs.kept) < PARTS
    said = f"200 sentences in {PARTS} parts, {len(missing(runs))} of them to embed"
    assert said in runs.lines
    now = written(runs.output)
    assert len(now) == PARTS and runs.kept.items() <= now.items(), "files are written once"
    assert not list(runs.output.glob(".part*")), "what was half written is gone"


def test_a_run_with_nothing_to_do_starts_no_actors(runs: Runs, program: Any, capsys: Any) -> None:
    assert program.main([*map(str, WORDS), "--output", str(runs.output)]) == 0
    assert "0 of them to embed" in capsys.readouterr().out
    assert not program.ray.is_initialized()


def test_embeddings_and_lengths_are_those_of_the_float_model(runs: Runs, program: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sentence_transformers import SentenceTransformer

    table = pq.read_table(runs.output).sort_by("id")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    texts = program.make_corpus(SENTENCES)
    model = SentenceTransformer(str(program.get_model_path()), device="cpu")
    assert table["length"].to_pylist() == [len(ids) for ids in model.tokenizer(texts)["input_ids"]]
    want = model.encode(texts, show_progress_bar=False)
    same = program.cosines(runs.output, want)
    assert len(same) == SENTENCES and same.min() > 0.99
    assert same.min() < 1 - 1e-5, "int8 rounds: equal embeddings mean that nothing was rewritten"


def test_every_linear_is_int8(runs: Runs) -> None:
    assert any("100% of the linears' FLOPs in int8" in line for line in runs.lines)


def test_the_corpus_is_the_same_every_time_and_of_many_lengths(program: Any) -> None:
    texts = program.make_corpus(1000)
    assert texts == program.make_corpus(1000) and texts[:10] == program.make_corpus(10)
    assert len(set(texts)) == 1000
    words = [len(text.split()) for text in texts]
    assert min(words) < 10 and max(words) > 80


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--sentences", "201"), "sentences is 200 there and 201 here"),
        (("--part", "11"), "sentences of a part is 10 there and 11 here"),
    ],
)
def test_a_folder_of_another_corpus_is_refused(
    runs: Runs, program: Any, capsys: Any, change: tuple[str, str], said: str
) -> None:
    before = written(runs.output)
    assert program.main([*map(str, WORDS), *change, "--output", str(runs.output)]) == 2
    assert said in capsys.readouterr().err
    assert written(runs.output) == before


def test_a_folder_of_something_else_is_refused(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert program.main(["--sentences", "5", "--output", str(tmp_path)]) == 2
    assert "no output of this program" in capsys.readouterr().err
    (tmp_path / program.MANIFEST).write_text("{")
    assert program.main(["--sentences", "5", "--output", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_a_missing_or_double_id_is_an_error(program: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    program.write_part(tmp_path, 0, pa.table({"id": [0, 1, 2]}))
    program.check_output(tmp_path, 3)
    with pytest.raises(program.OutputError, match="3 rows with 3 different ids"):
        program.check_output(tmp_path, 4)
    program.write_part(tmp_path, 1, pa.table({"id": [2]}))
    with pytest.raises(program.OutputError, match="4 rows with 3 different ids"):
        program.check_output(tmp_path, 3)


@pytest.mark.parametrize("option", ["--actors", "--threads", "--part", "--sentences", "--batch"])
def test_none_of_something_is_refused(program: Any, capsys: Any, option: str) -> None:
    with pytest.raises(SystemExit):
        program.main(["--output", "never-made", option, "0"])
    assert f"{option}: must be at least 1, not 0" in capsys.readouterr().err
    assert not Path("never-made").exists()


def test_more_gpus_than_there_are_is_refused(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.ray, "init", lambda **_: None)
    monkeypatch.setattr(program.ray, "cluster_resources", lambda: {"CPU": 9.0, "GPU": 1.0})
    args = program.parse(["--output", str(tmp_path), "--actors", "2"])
    with pytest.raises(ValueError, match="2 actors on cuda need 2 GPUs, and Ray has 1"):
        program.start_ray(args)
    assert args.device == "cuda", "where Ray has GPUs, actors are on them"


def test_without_ray_it_says_what_to_install() -> None:
    code = "import sys, runpy; sys.modules['ray'] = None; runpy.run_path(sys.argv[1])"
    ran = subprocess.run(
        [sys.executable, "-c", code, EXAMPLES / "ray_embed.py"], capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "pip install 'graphquant[ray]'" in ran.stderr


@pytest.mark.slow
def test_it_is_compared_with_one_process_without_ray(program: Any, tmp_path: Path) -> None:
    words = ("--sentences", 100, "--part", 50, "--compare", 40, "--actors", 1, "--threads", 2)
    run = started("ray_embed.py", *words, "--output", tmp_path / "out")
    said, _ = run.communicate()
    assert run.returncode == 0, said
    for kind in ("float", "bfloat16", "int8"):
        assert re.search(rf"one process, {kind}, 2 threads +\d+ +\d+ +\d+\.\d\dx", said)
    # also where OMP_NUM_THREADS is 1, as in `make test`: torch has what was asked for
    assert "Ray Data, int8, 1 actors x 2 threads" in said
    worst = re.search(r"cosine to float: mean (\S+), worst (\S+)", said)
    assert worst and float(worst[2]) > 0.99
    manifest = json.loads((tmp_path / "out" / program.MANIFEST).read_text())
    assert manifest["sentences"] == 100
    assert np.isfinite(program.cosines(tmp_path / "out", np.ones((100, 384), np.float32))).all()
