"""Position biases published for LLaVA-1.5-7B, ready to use.

The authors of PoRe released, with version 2 of the paper (arXiv 2508.17807v2, code
intcomp/attention-bias @ e75ebe7), the weights P_0 / P_i that they measured over the 576 visual
tokens of LLaVA-1.5-7B, one per host method and benchmark. All but FastV's are pure exponentials,
which their rates, given here to 1e-5 per token, describe fully. FastV's is a cubic curve of which
only last/first = 2.79 is reported, so it is not among them: calibrate for FastV.

The layer, normalisation, processor and template of these measurements are not known, so they are
not checked.
"""

from __future__ import annotations

from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.errors import ProfileError

_BENCHMARKS = (
    "vqav2",
    "gqa",
    "vizwiz",
    "sqa",
    "textvqa",
    "pope",
    "mme",
    "mmb",
    "mmb-cn",
    "mm-vet",
)


# 1e-5 per token, in the order of the benchmarks.
_RATES = {
    "himap": (221, 217, 197, 171, 148, 225, 204, 161, 148, 170),
    "pyramiddrop": (376, 399, 252, 270, 315, 405, 327, 265, 260, 413),
    "sparsevlm": (412, 230, 274, 299, 315, 464, 380, 320, 260, 422),
    "tokencarve": (170, 167, 143, 118, 118, 171, 147, 130, 111, 170),
}


_GRID = (24, 24)


def available() -> list[tuple[str, str]]:
    """The host method and benchmark of every published bias."""
    return [(host, benchmark) for host in _RATES for benchmark in _BENCHMARKS]


def published(*, host: str, benchmark: str) -> PositionBias:
    """The bias published for a host method, measured on a benchmark.

    Args:
        host: "himap", "pyramiddrop", "sparsevlm" or "tokencarve", in any case.
        benchmark: "vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mme", "mmb", "mmb-cn" or
            "mm-vet", in any case.

    Returns:
        The exponential bias over 576 positions.

    Raises:
        ProfileError: None was published for this host or benchmark.
    """
    host, benchmark = host.lower(), benchmark.lower()
    if host not in _RATES:
        why = (
            " For FastV only last/first = 2.79 is reported; calibrate for it (pore calibrate)."
            if host == "fastv"
            else ""
        )
        raise ProfileError(
            f"No bias is published for the host {host!r}; there are {', '.join(_RATES)}.{why}"
        )
    if benchmark not in _BENCHMARKS:
        raise ProfileError(
            f"No bias is published for the benchmark {benchmark!r}; "
            f"there are {', '.join(_BENCHMARKS)}."
        )
    return PositionBias.exponential(
        _RATES[host][_BENCHMARKS.index(benchmark)] / 1e5,
        _GRID[0] * _GRID[1],
        grid=_GRID,
        provenance=Provenance(
            model="llava-hf/llava-1.5-7b-hf",
            host=host,
            source=(
                f"arXiv 2508.17807v2, released weights of {host} on {benchmark} "
                "(intcomp/attention-bias @ e75ebe7), fitted rate"
            ),
        ),
    )
