"""What a server counts, as text that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from threading import Lock


class Metrics:
    """Numbers of a server since its start; any thread may change them.

    Args:
        about: Labels of the server, such as its model and its method.

    Attributes:
        in_flight: Requests that are being answered, or wait for it.
    """

    def __init__(self, **about: str) -> None:
        self._about = about
        self._lock = Lock()
        self._requests: Counter[int] = Counter()
        self._seen = self._kept = 0
        self._prefills: list[float] = [0, 0.0]
        self._generations: list[float] = [0, 0.0]
        self.in_flight = 0

    def begin(self) -> None:
        """A request has come."""
        with self._lock:
            self.in_flight += 1

    def end(self, status: int) -> None:
        """A request that `begin` counted was answered.

        Args:
            status: The HTTP status of the answer; 499 where the client had gone.
        """
        with self._lock:
            self.in_flight -= 1
            self._requests[status] += 1

    def turn_away(self, status: int) -> None:
        """A request was refused before it began.

        Args:
            status: The HTTP status of the refusal.
        """
        with self._lock:
            self._requests[status] += 1

    def prefilled(self, seen: int, kept: int, seconds: float) -> None:
        """A prompt was prefilled.

        Args:
            seen: Visual tokens that it came with.
            kept: Visual tokens that reached the last layer.
            seconds: How long it took, from the vision tower to the first scores.
        """
        with self._lock:
            self._seen += seen
            self._kept += kept
            self._prefills = [self._prefills[0] + 1, self._prefills[1] + seconds]

    def generated(self, seconds: float) -> None:
        """A call of `generate` has ended.

        Args:
            seconds: How long it took, the prefill included.
        """
        with self._lock:
            self._generations = [self._generations[0] + 1, self._generations[1] + seconds]

    def text(self) -> str:
        """All numbers, in Prometheus' text format."""
        with self._lock:
            about = ",".join(f'{name}="{_escaped(value)}"' for name, value in self._about.items())
            requests = [
                f'pore_requests_total{{status="{status}"}} {count}'
                for status, count in sorted(self._requests.items())
            ]
            lines = [
                "# HELP pore_info What is served, and how it is pruned.",
                "# TYPE pore_info gauge",
                f"pore_info{{{about}}} 1",
                "# HELP pore_requests_total Requests for chat completions, by status.",
                "# TYPE pore_requests_total counter",
                *requests,
                "# HELP pore_requests_in_flight Requests being answered, or waiting for it.",
                "# TYPE pore_requests_in_flight gauge",
                f"pore_requests_in_flight {self.in_flight}",
                "# HELP pore_visual_tokens_seen_total Visual tokens that prompts came with.",
                "# TYPE pore_visual_tokens_seen_total counter",
                f"pore_visual_tokens_seen_total {self._seen}",
                "# HELP pore_visual_tokens_kept_total Those of them that reached the last layer.",
                "# TYPE pore_visual_tokens_kept_total counter",
                f"pore_visual_tokens_kept_total {self._kept}",
                "# HELP pore_prefill_seconds Time from the vision tower to the first scores.",
                *_summary("pore_prefill_seconds", *self._prefills),
                "# HELP pore_generation_seconds Time of generate, the prefill included.",
                *_summary("pore_generation_seconds", *self._generations),
            ]
        return "\n".join(lines) + "\n"


def _summary(name: str, count: float, total: float) -> list[str]:
    return [f"# TYPE {name} summary", f"{name}_sum {total:.6f}", f"{name}_count {int(count)}"]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
