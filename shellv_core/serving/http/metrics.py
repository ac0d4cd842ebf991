"""What Prometheus is told: vLLM's names and labels with our prefix, so that its dashboards need one word changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shellv_core.serving.models import Models

if TYPE_CHECKING:
    from shellv_core.serving.engine import TokenEvent
    from shellv_core.serving.http.trace import InFlight

SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
GAUGES = {
    "num_requests_running": ("running", "Requests that have a slot."),
    "num_requests_waiting": ("waiting", "Requests that wait for one."),
    "num_slots": ("slots", "Requests that can run at once."),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of all prompts."),
    "generation_tokens": ("completion_tokens", "Tokens generated."),
    "prefix_cache_hits": ("prefix_tokens", "Tokens of prompts that were taken from an earlier request."),
    "image_cache_hits": ("image_hits", "Pictures whose features were at hand."),
    "image_cache_misses": ("image_misses", "Pictures that the vision tower had to see."),
    "request_cancelled": ("cancelled", "Requests whose client left."),
    "request_failed": ("failed", "Requests that the model failed on."),
    "request_nonfinite": ("nonfinite", "Requests that ended because logits were not finite."),
    "out_of_memory": ("out_of_memory", "Steps in which the memory ran out."),
    "engine_restarts": ("restarts", "Times that the engine's thread died and was started again."),
}


class Metrics:
    """The server's figures; `registry` holds them.

    Args:
        models: whose engines are asked for their counters at every reading.
        in_flight: the requests that are being answered or wait.
    """

    def __init__(self, models: Models, in_flight: InFlight) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(_EngineCollector(models))
        # Without a colon, which is no letter of a metric's name in Kubernetes: what replicas are scaled by.
        gauge = Gauge("shellv_requests_in_flight", "Requests that are answered or wait.", registry=self.registry)
        gauge.set_function(lambda: in_flight.count)
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", LONG)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens.", SHORT)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", LONG)
        self.queue = self._histogram("request_queue_time_seconds", "From arrival to the request's turn.", LONG)
        self.success = self._counter(
            "request_success", "Answers that came to their end.", "model_name", "finished_reason"
        )
        self.rejected = self._counter("request_rejected", "Requests that were refused.", "reason")
        self.responses = self._counter("http_responses", "Responses of the API.", "path", "status")

    def answer(self, model_name: str, started: float) -> AnswerClock:
        """Follow one answer that arrived at `started` (by `time.monotonic`)."""
        return AnswerClock(self, model_name, started)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"shellv:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"shellv:{name}", text, labels, registry=self.registry)


class AnswerClock:
    """Times the steps of one answer."""

    def __init__(self, metrics: Metrics, model_name: str, started: float) -> None:
        self._metrics, self._model, self._started = metrics, model_name, started
        self._last: float | None = None
        self._begun = False

    def observe(self, event: TokenEvent) -> None:
        """Take note of a step."""
        now, metrics = time.monotonic(), self._metrics
        if not self._begun:
            self._begun = True
            metrics.queue.labels(self._model).observe(now - self._started)
        if event.completion_tokens:
            if self._last is None:
                metrics.first_token.labels(self._model).observe(now - self._started)
            else:
                metrics.inter_token.labels(self._model).observe(now - self._last)
            self._last = now
        if event.finish_reason is not None:
            metrics.end_to_end.labels(self._model).observe(now - self._started)
            metrics.success.labels(self._model, event.finish_reason).inc()


class _EngineCollector(Collector):
    """The engines' own counters, read when they are asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Each engine once, under the name of the model that is no adapter."""
        stats: dict[str, Any] = {model.name: model.engine.stats() for model in self._models.list() if not model.parent}
        families: list[tuple[Metric, str]] = []
        for name, (field, text) in GAUGES.items():
            families.append((GaugeMetricFamily(f"shellv:{name}", text, labels=["model_name"]), field))
        for name, (field, text) in COUNTERS.items():
            families.append((CounterMetricFamily(f"shellv:{name}", text, labels=["model_name"]), field))
        for family, field in families:
            for model_name, each in stats.items():
                family.add_metric([model_name], getattr(each, field))  # type: ignore[attr-defined]
            yield family
        usage = GaugeMetricFamily("shellv:kv_cache_usage_perc", "Share of the cache in use.", labels=["model_name"])
        for model_name, each in stats.items():
            usage.add_metric([model_name], each.kv_tokens / each.kv_capacity if each.kv_capacity else 0.0)
        yield usage
