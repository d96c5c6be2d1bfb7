"""examples/embed.py keeps what it promises: real weights, real sentences, int8 beside float."""

from __future__ import annotations

import torch


def test_sentences_are_many_on_many_topics_and_all_different(example):
    topics = example.read_sentences()
    sentences = [sentence for group in topics.values() for sentence in group]
    assert len(topics) >= 9
    assert all(len(group) >= 8 for group in topics.values())
    assert len(set(sentences)) == len(sentences) >= 72
    words = [len(sentence.split()) for sentence in sentences]
    assert min(words) < 8 and max(words) > 40


def test_embeddings_have_length_one_and_do_not_see_the_padding(example):
    model, tokenize = example.load_model(torch.device("cpu"))
    short, long = "He forgot.", "The choir sang without accompaniment in a very old church."
    together = example.embed(model, tokenize([short, long]))
    alone = example.embed(model, tokenize([short]))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_compare_sees_a_changed_neighbor(example):
    a = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    b = a[[0, 2, 1]]
    same, changed = example.compare(a, a), example.compare(a, b)
    assert same.ok and same.same_neighbor.all()
    assert not changed.ok and not changed.same_neighbor.all()


def test_models_are_timed_in_turns_and_the_fastest_run_counts(example, monkeypatch):
    calls, took = [], iter(range(100, 0, -1))
    monkeypatch.setattr(example, "embed", lambda model, batch: calls.append(model))

    def seconds(run, device):
        run()
        return next(took) / 1e3

    monkeypatch.setattr(example, "seconds", seconds)
    best = example.best_ms({"float32": "a", "int8": "b"}, None, torch.device("cpu"))
    assert "".join(calls) == "ab" * example.RUNS
    assert best == {"float32": 102 - 2 * example.RUNS, "int8": 101 - 2 * example.RUNS}


def test_bfloat16_is_shown_where_it_is_of_use(example, monkeypatch):
    slow = {"float32": 30.0, "bfloat16": 60.0, "int8": 10.0}
    has = {"avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    lines = example.time_lines(slow, "inductor", 84)
    assert [line.partition(",")[0] for line in lines[:-1]] == ["float32", "int8"]
    assert lines[-1].startswith("speed-up                 int8: 3.00x float32; ")
    fast = example.time_lines({**slow, "bfloat16": 20.0}, "inductor", 84)
    assert "int8, inductor              10.0 ms    8,400 sentences/s" in fast
    assert (
        "3.00x float32, 2.00x bfloat16;"
        in example.time_lines({"float32": 30.0, "bfloat16": 20.0, "int8": 10.0}, "inductor", 84)[-1]
    )
    has["avx512_bf16"] = True
    assert len(example.time_lines(slow, "inductor", 84)) == 4
    assert len(example.time_lines({"float16": 3.0, "int8": 2.0}, "inductor", 84)) == 3  # a GPU


def test_a_histogram_of_lengths(example):
    assert example.histogram([1, 8, 9, 24, 17]) == [
        "  1 to   8 tokens  ██ 2",
        "  9 to  16 tokens  █ 1",
        " 17 to  24 tokens  ██ 2",
    ]
    assert max(map(len, example.histogram([5] * 1000))) < 70


def test_int8_embeddings_of_real_sentences_are_close_to_the_float_ones(example):
    model, tokenize = example.load_model(torch.device("cpu"))
    # The first two of each topic say the same thing in two ways: each is the other's neighbor.
    batch = tokenize([s for group in example.read_sentences().values() for s in group[:2]])
    int8_model = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    result = example.compare(example.embed(model, batch), example.embed(int8_model, batch))
    assert result.mean >= example.MIN_MEAN_COSINE
    assert result.worst >= example.MIN_WORST_COSINE
    assert result.same_neighbor.all()
    assert result.worst < 1 - 1e-5, "int8 rounds: equal embeddings mean that nothing was rewritten"


def test_every_linear_of_the_real_model_is_in_int8(example):
    import graphquant

    model, tokenize = example.load_model(torch.device("cpu"))
    with torch.inference_mode():
        report = graphquant.explain(model, **tokenize(["The guitar is out of tune."]))
    assert report.coverage == 1.0, str(report)
