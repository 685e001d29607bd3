"""The server's metrics, in Prometheus's text format."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_from_scratch.serving.engine import Engine
from lora_from_scratch.serving.scheduler import Event, Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # upper bounds of the histograms' buckets


class Metrics:
    """The metrics of one server. Adapter names are not used as labels, since there may be thousands."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        scheduler, store, pool = engine.scheduler, engine.scheduler.store, engine.scheduler.pool
        self.errors = Counter("lora_errors", "Answers that are errors, by status", ["status"], registry=self.registry)
        self.completions = Counter("lora_completions", "Texts, by why they ended", ["reason"], registry=self.registry)
        self.prompt_tokens = Counter("lora_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.tokens = Counter("lora_generated_tokens", "Tokens generated", registry=self.registry)
        self.first = Histogram(
            "lora_first_token_seconds", "Seconds to a text's first token", registry=self.registry, buckets=SECONDS
        )
        self.duration = Histogram(
            "lora_completion_seconds", "Seconds to a text's end", registry=self.registry, buckets=SECONDS
        )
        gauges = {
            "lora_running": ("Requests in the batch", lambda: len(scheduler.running)),
            "lora_waiting": ("Requests that wait for their turn", lambda: len(scheduler.waiting)),
            "lora_pool_pages": ("Pages of the pool", lambda: len(pool)),
            "lora_pool_pages_free": ("Pages that are free", lambda: len(pool.free)),
            "lora_adapters_resident": ("Adapters in the pool", lambda: len(store.resident)),
            "lora_adapter_loads": ("Adapters copied to the pool since the start", lambda: store.loads),
            "lora_adapter_evictions": ("Adapters evicted from the pool since the start", lambda: store.evictions),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)
        self._since: dict[Request, float] = {}

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def started(self, requests: Sequence[Request]) -> None:
        self._since |= dict.fromkeys(requests, time.monotonic())

    def took(self, event: Event) -> None:
        """Record an event that is not an error."""
        seconds = time.monotonic() - self._since[event.request]
        if event.token is not None:
            self.tokens.inc()
            if len(event.request.tokens) == 1:
                self.first.observe(seconds)
        if event.finished:
            self.prompt_tokens.inc(len(event.request.prompt))
            self.completions.labels(event.finished).inc()
            self.duration.observe(seconds)

    def refused(self, status: int) -> None:
        self.errors.labels(str(status)).inc()

    def ended(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._since.pop(request, None)
