"""The metrics of a server, for Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from perceiver_ar.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Metrics of one server, separate from those of others in the process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "perceiver_ar_requests", "Requests answered, by path and status.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("perceiver_ar_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated = Counter("perceiver_ar_generated_tokens", "Tokens drawn.", registry=registry)
        self.gone = Counter("perceiver_ar_disconnects", "Requests whose client went away.", registry=registry)
        self.first_token = Histogram(
            "perceiver_ar_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.next_token = Histogram(
            "perceiver_ar_next_token_seconds", "From token to token of a row.", buckets=SECONDS, registry=registry
        )
        gauges = {
            "rows_running": ("Rows that run.", lambda: engine.running),
            "prompts_waiting": ("Prompts in the queue.", lambda: engine.waiting),
            "slots": ("Rows that can run at the same time.", lambda: engine.slots),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"perceiver_ar_{name}", text, registry=registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        """Counts an answer. path: a route's template, as clients can invent any number of paths."""
        self.requests.labels(path, status).inc()


class TokenTimes:
    """Counts the tokens of one prompt's samples, and measures the times of the first sample."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.latest, self.first = metrics, time.monotonic(), True

    def token(self, sample: int) -> None:
        self.metrics.generated.inc()
        if sample == 0:
            now = time.monotonic()
            (self.metrics.first_token if self.first else self.metrics.next_token).observe(now - self.latest)
            self.latest, self.first = now, False
