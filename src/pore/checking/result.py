"""The result of a check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pore._compat.versions import newest_tested


@dataclass(frozen=True)
class Row:
    """One invariant of one method, such as "FastV (decoder): keep-all is bit-equal".

    Attributes:
        name: The method, where it acts, and what must hold.
        dtype: Type of the twin's weights.
        holds: Whether the invariant holds.
        finding: What was found, such as "logits 3.1e-07 of the largest apart".
    """

    name: str
    dtype: str
    holds: bool
    finding: str


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`.

    Attributes:
        model: The class of the model.
        family: The family to which pore assigns it.
        versions: Of pore, transformers and torch.
        tested: Whether this transformers is no newer than those that pore was tested with.
        device: Where the twin ran.
        attention: The decoder's attention implementation.
        cache: The kind of cache that `generate` made.
        parameters: Number of parameters of the twin.
        seconds: How long it took.
        rows: The invariants.
    """

    model: str
    family: str
    versions: dict[str, str]
    tested: bool
    device: str
    attention: str
    cache: str
    parameters: int
    seconds: float
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every invariant holds."""
        return all(row.holds for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The invariants that do not hold."""
        return tuple(row for row in self.rows if not row.holds)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {**asdict(self), "passed": self.passed}

    @property
    def summary(self) -> str:
        """The outcome in a few words."""
        failed = len(self.failures)
        held = "all holds" if self.passed else f"{failed} of {len(self.rows)} do not hold"
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        beyond = "" if self.tested else f" (newer than {newest_tested()}, the newest tested)"
        return (
            f"{self.model} ({self.family}): {held} with {versions}{beyond}; {self.device}, "
            f"{self.attention} attention, {self.cache} cache. A twin of {self.parameters:,} "
            f"parameters, {self.seconds:.1f} s."
        )

    def __str__(self) -> str:
        lines = [self.summary]
        for row in self.rows:
            mark = "holds" if row.holds else "FAILS"
            lines.append(f"  {mark}  {row.dtype:<8}  {row.name}: {row.finding}")
        return "\n".join(lines)
