"""What Prometheus reads: how long things take, how much is open, how full the caches are.

plait_time_to_first_token_seconds counts from the arrival of the request's head to its first token, so that reading the
body, templates, tokenisation and waiting in the queue are part of it.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from plait.engine.request import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)

# field of Load -> (name, what it says)
_GAUGES = {
    "running": ("plait_sequences_running", "answers in the batch"),
    "waiting": ("plait_sequences_waiting", "answers that wait for their first token"),
    "preempted": ("plait_sequences_preempted", "answers set aside for others"),
    "slots": ("plait_state_slots_used", "slots of Mamba state in use"),
    "slots_total": ("plait_state_slots", "slots of Mamba state"),
    "pages": ("plait_kv_pages_used", "pages of attention keys and values in use"),
    "pages_total": ("plait_kv_pages", "pages of attention keys and values"),
    "cache_bytes": ("plait_cache_bytes", "memory of both pools"),
    "beside_bytes": (
        "plait_cache_beside_bytes",
        "memory outside of them: states of prefixes, answers set aside, a smaller model's caches",
    ),
    "prefix_entries": ("plait_prefix_snapshots", "prefixes kept"),
    "prefix_bytes": ("plait_prefix_bytes", "memory of kept prefixes: pages in the pool, states outside of it"),
}
_COUNTERS = {
    "steps": ("plait_engine_steps", "steps of the engine"),
    "prompt_tokens": ("plait_prompt_tokens", "tokens of prompts that were computed"),
    "generated_tokens": ("plait_generated_tokens", "tokens made"),
    "finished": ("plait_answers_finished", "answers that ended, in whatever way"),
    "preemptions": ("plait_preemptions", "times that an answer was set aside"),
    "prefix_hits": ("plait_prefix_hits", "prompts whose beginning was known"),
    "prefix_misses": ("plait_prefix_misses", "prompts whose beginning was not known"),
    "guessed": ("plait_guessed_tokens", "tokens that were guessed (speculation)"),
    "guessed_right": ("plait_guessed_right_tokens", "guesses that stood"),
    "prefix_tokens": ("plait_prefix_tokens", "tokens of prompts that were not computed again"),
}


class Metrics:
    """The figures of one server."""

    def __init__(self, load: Callable[[], Load | None], queue: Callable[[], tuple[int, int]]) -> None:
        """
        Args:
            load: the engine's counters; None while there is no engine.
            queue: how many answers are open, and how many may be.
        """
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(load, queue))
        self.requests = Counter("plait_requests", "requests answered", ("route", "status"), registry=self.registry)
        self.refused = Counter("plait_requests_refused", "requests turned away when full", registry=self.registry)
        self.first = Histogram(
            "plait_time_to_first_token_seconds", "arrival to first token", buckets=_FIRST, registry=self.registry
        )
        self.between = Histogram(
            "plait_inter_token_seconds", "between two tokens of an answer", buckets=_BETWEEN, registry=self.registry
        )
        self.whole = Histogram(
            "plait_request_seconds", "arrival to end", ("route",), buckets=_WHOLE, registry=self.registry
        )
        self.ends = Counter("plait_answers", "answers by why they ended", ("reason",), registry=self.registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    @property
    def n_answered(self) -> int:
        """Requests to the routes of OpenAI that were answered well."""
        samples = [sample for metric in self.requests.collect() for sample in metric.samples]
        return round(
            sum(
                sample.value
                for sample in samples
                if sample.name.endswith("_total")
                and sample.labels["route"].startswith("/v1/")
                and sample.labels["status"] < "400"
            )
        )

    def value(self, name: str, **labels: str) -> float:
        """One of them; 0 for what has not happened yet."""
        return self.registry.get_sample_value(name, labels) or 0.0


class _Engine(Collector):
    def __init__(self, load: Callable[[], Load | None], queue: Callable[[], tuple[int, int]]) -> None:
        self._load, self._queue = load, queue

    def collect(self) -> Iterator[Metric]:
        taken, places = self._queue()
        yield GaugeMetricFamily("plait_places_taken", "answers that the server has open", value=taken)
        yield GaugeMetricFamily("plait_places", "answers that the server lets in at one time", value=places)
        load = self._load()
        if load is None:
            return
        for field, (name, help) in _GAUGES.items():
            yield GaugeMetricFamily(name, help, value=getattr(load, field))
        for field, (name, help) in _COUNTERS.items():
            yield CounterMetricFamily(name, help, value=getattr(load, field))
        looked = load.prefix_hits + load.prefix_misses
        rate = load.prefix_hits / looked if looked else 0.0
        yield GaugeMetricFamily("plait_prefix_hit_ratio", "prompts whose beginning was known, of all", value=rate)
