"""What a server counts."""

from __future__ import annotations

import re
import threading

from pore.serving.metrics import Metrics


def test_what_is_counted() -> None:
    metrics = Metrics(model='a"b\\c\nd', keep="0.25")
    metrics.begin()
    metrics.begin()
    metrics.end(200)
    metrics.turn_away(503)
    metrics.prefilled(144, 36, 0.5)
    metrics.prefilled(144, 3, 0.25)
    metrics.generated(1.5)
    lines = metrics.text().splitlines()
    for line in (
        r'pore_info{model="a\"b\\c\nd",keep="0.25"} 1',
        'pore_requests_total{status="200"} 1',
        'pore_requests_total{status="503"} 1',
        "pore_requests_in_flight 1",
        "pore_visual_tokens_seen_total 288",
        "pore_visual_tokens_kept_total 39",
        "pore_prefill_seconds_sum 0.750000",
        "pore_prefill_seconds_count 2",
        "pore_generation_seconds_count 1",
    ):
        assert line in lines
    number = r"[a-z_]+(\{.*\})? \d+(\.\d+)?"
    assert all(
        line.startswith(("# HELP ", "# TYPE ")) or re.fullmatch(number, line) for line in lines
    )


def test_threads_lose_nothing() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(500):
            metrics.begin()
            metrics.prefilled(2, 1, 0.0)
            metrics.end(200)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = metrics.text()
    assert metrics.in_flight == 0
    assert 'status="200"} 2000' in text
    assert "seen_total 4000" in text
