"""Weights in bf16, compiled networks, and the bookkeeping of CUDA graphs, whose capture itself needs a GPU."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.networks import make_var

from varlab import VARPipeline
from varlab.sampling import acceleration
from varlab.sampling.acceleration import default_precision, use_bf16, why_no_graph
from varlab.sampling.generate import generate
from varlab.sampling.token_sampling import SamplingSettings


def test_weights_held_in_bf16_draw_what_autocast_draws(var, tokenizer, labels):
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(var, tokenizer, labels, return_tokens=True, top_k=5)
    images, encoded = torch.rand(2, 3, 16, 16), tokenizer.encode(torch.ones(2, 3, 16, 16) / 3)
    before = [tokenizer.encode(images), encoded]
    use_bf16(tokenizer, var)
    found = generate(var, tokenizer, labels, return_tokens=True, top_k=5)
    assert torch.equal(found[0], expected[0]) and found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    after = [tokenizer.encode(images), tokenizer.encode(torch.ones(2, 3, 16, 16) / 3)]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


def test_the_precision_follows_the_device():
    assert (default_precision("cpu"), default_precision("cuda:1")) == ("fp32", "bf16")


def test_a_pipeline_can_hold_bf16(var, tokenizer):
    expected = VARPipeline(copy.deepcopy(tokenizer), copy.deepcopy(var))([0, 1], top_k=1)
    pipeline = VARPipeline(tokenizer, var, dtype=torch.bfloat16)
    assert pipeline.var.head.weight.dtype == torch.bfloat16
    assert pipeline.tokenizer.quantizer.codebook.weight.dtype == torch.float32
    assert len(pipeline([0, 1], top_k=1)) == len(expected)
    with pytest.raises(ValueError, match="dtype=torch.float16: choose torch.float32 or torch.bfloat16"):
        VARPipeline(tokenizer, var, dtype=torch.float16)


def test_where_there_can_be_no_graph_sampling_says_why_once_and_runs_without(var, tokenizer, labels, caplog):
    expected = generate(var, tokenizer, labels)
    for _ in range(2):
        assert torch.equal(generate(var, tokenizer, labels, compiled="graph"), expected)
    assert [r.message for r in caplog.records] == [
        "compiled=graph: it needs a GPU, and this is the cpu; sampling runs without it"
    ]
    with pytest.raises(ValueError, match="compiled='all': choose one of none, blocks, graph"):
        generate(var, tokenizer, labels, compiled="all")


def test_what_no_graph_can_hold(var):
    cuda, plain = torch.device("cuda"), SamplingSettings()
    assert why_no_graph(var, plain, cuda) is None
    assert "smooth" in why_no_graph(var, SamplingSettings(smooth=True), cuda)
    assert "raster" in why_no_graph(make_var(order="raster"), plain, cuda)


@pytest.fixture
def cuda(monkeypatch):
    """The parts of torch.cuda that capture uses; a replay repeats the call and fills the results of the capture."""
    log = SimpleNamespace(captures=0, replays=0, error=None)

    class Graph(acceleration.CUDAGraph):
        def __init__(self, draw, condition, uniform):
            self.draw = draw
            super().__init__(draw, condition, uniform)

    class Replayed:
        owner = None

        def replay(self):
            log.replays += 1
            again = self.owner.draw(self.owner.condition, self.owner.uniform)
            self.owner.drawn.f_hat.copy_(again.f_hat)
            self.owner.drawn.images.copy_(again.images)
            for mine, new in zip(self.owner.drawn.token_maps, again.token_maps, strict=True):
                mine.copy_(new)

    @contextmanager
    def capture(graph):
        log.captures += 1
        if log.error:
            raise RuntimeError(log.error)
        yield

    def made(draw, condition, uniform):
        graph = Graph(draw, condition, uniform)
        graph.graph.owner = graph
        return graph

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext()}
    for name, fake in {**fakes, "CUDAGraph": Replayed, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(acceleration, "CUDAGraph", made)
    monkeypatch.setattr(acceleration, "why_no_graph", lambda *_: None)
    monkeypatch.setattr(acceleration, "compile_for_sampling", lambda *_: None)
    return log


def test_a_graph_is_captured_once_for_each_batch_size_and_settings(var, tokenizer, labels, cuda):
    def drawn(condition, seed, **settings):
        return generate(var, tokenizer, condition, seed=seed, **settings)

    expected = [drawn(labels, 0), drawn(labels.flip(0), 7), drawn(labels[:1], 0), drawn(labels, 0, top_k=2)]
    first = drawn(labels, 0, compiled="graph")
    second = drawn(labels.flip(0), 7, compiled="graph")
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])  # the first is not overwritten
    assert (cuda.captures, cuda.replays) == (1, 2)
    assert torch.equal(drawn(labels[:1], 0, compiled="graph"), expected[2])
    assert torch.equal(drawn(labels, 0, top_k=2, compiled="graph"), expected[3])
    assert (cuda.captures, cuda.replays) == (3, 4)
    drawn(labels, 3, top_k=2, compiled="graph")
    assert (cuda.captures, cuda.replays) == (3, 5)


def test_a_capture_that_fails_is_told_and_not_tried_again(var, tokenizer, labels, cuda, caplog):
    expected, cuda.error = generate(var, tokenizer, labels), "operation not permitted when stream is capturing"
    for _ in range(2):
        assert torch.equal(generate(var, tokenizer, labels, compiled="graph"), expected)
    assert cuda.captures == 1 and len(caplog.records) == 1
    assert "capture failed (operation not permitted" in caplog.records[0].message
