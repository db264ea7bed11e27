"""What an engine says of itself: a bounded log, counts, and the text that Prometheus reads."""

import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import plot
from paged_jax.engine import Engine, Statistics, prometheus_text
from paged_jax.engine.stats import Recorder
from paged_jax.sampling import SamplingParams


def make_engine(forward) -> Engine:
    return Engine(forward, np.int32(0), decoder.config(64), token_counts=(8, 32), visit_steps=4, max_bias_tokens=2)


def test_each_request_is_counted_once_and_the_log_says_what_happened():
    engine = make_engine(decoder.forward)
    engine.generate([[1, 2, 3, 4, 5]], SamplingParams(max_new_tokens=6, num_samples=2))
    statistics = engine.stats()
    assert (statistics.requests, statistics.samples, statistics.finished) == (1, 2, 2)
    assert statistics.prompt_tokens == 10 and statistics.cached_tokens == 4 and statistics.hit_rate == 0.4
    assert statistics.drawn_tokens == 12 and statistics.computed_tokens == 5 + 1 + 2 * 5
    assert statistics.waiting == statistics.running == statistics.preemptions == statistics.restarts == 0
    assert statistics.seconds_to_first_token > 0 and statistics.seconds_per_token > 0
    assert 0 < statistics.occupancy < 1
    events = [event for event in engine.events if event.sample == 1]
    assert [event.kind for event in events if event.kind != "decoded"] == [
        "queued",
        "admitted",
        "prefilled",
        "finished",
    ]
    assert sum(event.count for event in events if event.kind == "decoded") == 6
    assert events[-1].note == "length" and events[-1].count == 6
    shown = f"Engine: 0 samples run, 0 wait, {statistics.finished} have ended"
    assert repr(engine).startswith(shown) and "pages in use" in repr(engine)
    assert shown in engine._repr_html_() and "<svg" in engine._repr_html_()
    assert len(plot.latencies(engine).first_token) == 2 and plot.page_states(engine).max() <= 1
    assert {span.kind for span in plot.request_spans(engine)} >= {"prefill", "decode"}


def test_a_visit_costs_the_host_no_hash_of_the_decoder():
    class Counted:
        """Equal to the decoder, so that nothing is compiled for it."""

        hashes = 0

        def __call__(self, *arguments):
            return decoder.forward(*arguments)

        def __eq__(self, other):
            return other is decoder.forward or isinstance(other, Counted)

        def __hash__(self):
            Counted.hashes += 1
            return hash(decoder.forward)

    engine = make_engine(Counted())
    engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
    before, Counted.hashes = Counted.hashes, 0
    engine.generate([[4, 5, 6]], SamplingParams(max_new_tokens=20))
    assert before > 0 and Counted.hashes == 0


@pytest.mark.parametrize("num_events", [10_000, pytest.param(1_000_000, marks=pytest.mark.long)])  # ten seconds
def test_the_log_is_bounded(num_events):
    recorder = Recorder(max_events=100)
    for _ in range(num_events):
        recorder.preempted(1)
    assert len(recorder.events) == 100 and recorder.statistics().preemptions == num_events


def test_prometheus_reads_the_statistics():
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra metrics is not installed")
    statistics = Statistics(requests=3, steps={8: 5, 32: 2}, free_pages=(7, 9), num_pages=(10, 10), cached_pages=(1, 0))
    families = {family.name: family for family in parser.text_string_to_metric_families(prometheus_text(statistics))}
    assert [sample.value for sample in families["paged_jax_requests"].samples] == [3]
    steps = {sample.labels["tokens"]: sample.value for sample in families["paged_jax_steps"].samples}
    assert steps == {"8": 5, "32": 2} and families["paged_jax_steps"].type == "counter"
    free = {sample.labels["group"]: sample.value for sample in families["paged_jax_free_pages"].samples}
    assert free == {"0": 7, "1": 9} and families["paged_jax_free_pages"].type == "gauge"
