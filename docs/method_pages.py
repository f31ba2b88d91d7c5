"""Write what the registry knows into the pages of methods and families.

    python docs/method_pages.py           write it
    python docs/method_pages.py --check   exit with 1 where a page is not what the registry gives

Every method has a page in `docs/methods/`, which people write; the table of facts on it, the tables
of `docs/methods.md` and those of `docs/families.md` stand between marks and come from here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pore.cost.flops import decoder_flops
from pore.cost.named import SHAPES
from pore.engine.pruner import Pruner
from pore.engine.report import steps_of
from pore.engine.stages import Stage
from pore.methods.registry import methods
from pore.methods.support import Support, support
from pore.tower.stages import TowerStage

DOCS = Path(__file__).parent
SHAPE = SHAPES["llava-1.5-7b"]
VISUAL, KEEP, TEXT = 576, 128, 35  # the prompt of the paper's Table 1
GROUPS = (
    "Before the processor",
    "In the vision tower",
    "On the embeddings",
    "Inside the decoder, once",
    "Inside the decoder, in stages",
    "For videos",
)
# What no adapter says: how many visual tokens a picture becomes.
PICTURES = {
    "Aya Vision": "tiles with a token between them, pixel shuffle",
    "Command A Vision": "tiles with a token between them, pixel shuffle",
    "Gemma 3": "256, one for several patches",
    "Gemma 4": "any size, one for several patches",
    "Gemma 4 Unified": "any size, one for several patches",
    "GLM-4V": "any size, one for several patches",
    "InternVL": "tiles, pixel shuffle",
    "LightOnOCR": "any size, a break after every row, patches merged two by two",
    "Llama 4": "tiles with separators between them, pixel shuffle",
    "LLaVA-1.5": "576 with CLIP at 336 pixels; SigLIP towers too",
    "LLaVA-NeXT": "tiles, padding cut off, newlines kept",
    "LLaVA-NeXT-Video": "tiles, padding cut off, newlines kept",
    "LLaVA-OneVision": "tiles, padding cut off, newlines kept",
    "Mistral 3": "any size, a break after every row, patches merged two by two",
    "PaliGemma": "a square of one size",
    "Pixtral": "any size, a break after every row",
    "Qwen2-VL": "any size, positions on three axes",
    "Qwen3-VL": "any size, positions on three axes, DeepStack",
    "Qwen3.5": "any size, positions on three axes",
    "SmolVLM": "tiles with tags between them, pixel shuffle",
    "Video-LLaVA": "256; of a frame 257",
}


def page_of(name: str) -> str:
    """The file of a method's page: `prumerge-plus.md` for PruMerge+."""
    return f"{name.lower().replace('+', '-plus').replace(' ', '-')}.md"


def made(kind: type[Pruner], keep: int) -> Pruner | None:
    """A method as its authors set it up, at a budget; None where it needs more than that."""
    usual = kind.usual(keep, SHAPE)
    return kind(keep=keep) if usual is None and kind.videos_only else usual  # type: ignore[call-arg]


def group_of(kind: type[Pruner]) -> str:
    """Under which heading a method stands."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if kind.resizes:
        return GROUPS[0]
    if "images_as_frames" in names:
        return GROUPS[5]
    pruner = made(kind, 64)
    if pruner is None:
        return GROUPS[1] if "clip" in names else GROUPS[3]
    if pruner.tower_stage is not None:
        return GROUPS[1]
    layers = _pruned_layers(pruner)
    return GROUPS[2] if layers == [0] else GROUPS[3 if len(layers) == 1 else 4]


def _pruned_layers(pruner: Pruner) -> list[int]:
    """The layers before which visual tokens go; 0 are the embeddings."""
    counts = [VISUAL, *pruner.counts(VISUAL, SHAPE.decoder.layers)]
    return [layer for layer in range(len(counts) - 1) if counts[layer + 1] < counts[layer]]


def _acts(kind: type[Pruner]) -> str:
    """Where a method acts, in words."""
    if kind.resizes:
        return "on the picture, before the processor"
    pruner = made(kind, 64)
    if pruner is None:
        tower = group_of(kind) == GROUPS[1]
        return "in the vision tower" if tower else "in the decoder, once, before `layer`"
    if pruner.tower_stage is not None:
        return "in the vision tower"
    if kind.videos_only:
        if any(isinstance(one, Stage) and one.layer for one in pruner.stages_in(32)):
            return "in the decoder, in the first layers"
        second = any(field.name == "inner" for field in fields(kind))  # type: ignore[arg-type]
        return "on the embeddings" + (", and once in the decoder with `layer`" if second else "")
    layers = _pruned_layers(pruner)
    if layers == [0]:
        return "on the embeddings"
    if len(layers) > 8:
        return f"in the decoder, before {len(layers)} of 32 layers"
    word = "layer" if len(layers) == 1 else "layers"
    return f"in the decoder, before {word} {' and '.join(_listed(layers))} of 32"


def _listed(layers: list[int]) -> list[str]:
    """Numbers for `and` to join: all but the last in one string."""
    *first, last = map(str, layers)
    return [", ".join(first), last] if first else [last]


def _bias(kind: type[Pruner]) -> str:
    if not kind.reweightable:
        return "no"
    if kind.always_reweighted:
        return "yes, it must be given"
    return "yes" if kind.harmed is None else "yes, but it lost answers on the embedded model"


def _papers(kind: type[Pruner]) -> str:
    return re.sub(
        r"arXiv (\d{4}\.\d{5})(v\d+)?",
        lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[1]}{found[2] or ''})",
        kind.paper,
    )


def _settings(kind: type[Pruner]) -> str:
    """The call with all settings; long defaults are left out."""
    given = []
    for field in fields(kind):  # type: ignore[arg-type]
        default = "" if field.default is MISSING else f"={field.default!r}"
        given.append(field.name + (default if len(default) < 30 else "=(...)"))
    return f"`pore.{kind.__name__}({', '.join(given)})`"


def _positions(pruner: Pruner) -> str:
    """Whether what stays keeps its positions."""
    stages = pruner.stages_in(32)
    dense = [isinstance(one, TowerStage) or one.dense for one in stages]
    return "numbered anew" if any(dense) else "kept"


def facts(name: str, kind: type[Pruner], found: list[Support]) -> Iterator[str]:
    """The rows of a method's table."""
    yield "| | |\n|---|---|"
    yield f"| acts | {_acts(kind)} |"
    pruner = made(kind, KEEP)
    if pruner is not None and not kind.videos_only:
        counts = pruner.counts(VISUAL, SHAPE.decoder.layers)
        flops, whole = (
            decoder_flops(SHAPE.decoder, [TEXT + one for one in tokens]).decoder / 1e12
            for tokens in (counts, [VISUAL] * len(counts))
        )
        mean = sum(counts) / len(counts)
        steps = steps_of(counts)
        if len(set(counts)) > 8:
            steps = f"from {counts[0]} down to {counts[-1]} in {len(set(counts))} sizes"
        yield f"| visual tokens by layer | {steps}; on average {mean:.0f} |"
        yield (
            f"| prefill of the decoder | {flops:.2f} of {whole:.2f} TFLOPs (LLaVA-1.5-7B, {KEEP} "
            f"of {VISUAL} visual tokens, without what the method itself computes) |"
        )
    if pruner is not None and not kind.resizes:
        yield f"| positions | {_positions(pruner)} |"
    yield f"| takes P | {_bias(kind)} |"
    if "images_as_frames" in {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        yield f"| pictures | {'stay whole' if kind.videos_only else 'yes'} |"
    if name in found[0].limits:
        yield f"| refused in | {'; '.join(_refused(name, found)) or 'no family'} |"
    if kind.experimental:
        yield "| experimental | built from a description, with no code of its authors |"
    for answers in measured(name):
        yield f"| right answers | {answers} |"
    yield f"| paper | {_papers(kind)} |"
    yield f"| call | {_settings(kind)}, [explained](../api/methods.md#pore.{kind.__name__}) |"


def _refused(name: str, found: list[Support]) -> Iterator[str]:
    """Where a method is refused, grouped by when it works there all the same."""
    grouped: dict[str, list[str]] = {}
    for one in found:
        limits = one.limits[name]
        if limits:
            unless = [limit.unless for limit in limits]
            when = "" if None in unless else f", unless {' and '.join(map(str, unless))}"
            grouped.setdefault(when, []).append(one.family.name)
    for when, families in sorted(grouped.items()):
        yield ", ".join(families) + when


def measured(name: str) -> Iterator[str]:
    """What the comparison on the embedded model says of a method, if it is in there."""
    found = {}
    for line in (DOCS / "comparison.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 8 and re.match(r"\d+\.\d ± ", cells[2]):
            found[cells[0].rstrip(" †‡§")] = [re.split(r" ±|\s", cell)[0] for cell in cells[2:5]]
    if name in found:
        tokens = "48 / 32 / 16" if name != "Downsample" else "48 / 35 / 16"
        beside = "" if name == "Random" else f"; a random choice {' / '.join(found['Random'])} %"
        yield (
            f"{' / '.join(found[name])} % with {tokens} of 144 tokens of the "
            f"[embedded model](../comparison.md){beside}"
        )


def index() -> Iterator[str]:
    """The tables of all methods."""
    for group in GROUPS:
        yield f"\n### {group}\n"
        decoder, videos = "decoder" in group, group == GROUPS[5]
        columns = ["method", "what it does"]
        columns += ["acts"] * (decoder or videos) + ["tokens"] * (not videos) + ["takes P"]
        yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
        for name, kind in built_in().items():
            if group_of(kind) != group:
                continue
            does = (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").rstrip(".")
            does = re.sub(r" +", " ", re.sub(r" ?\((\w+,? )?arXiv [^)]*\)", "", does))
            pruner = made(kind, KEEP)
            mean = "" if pruner is None or kind.videos_only else _mean(pruner)
            row = [f"[{name}](methods/{page_of(name)})", does.strip()]
            row += [_acts(kind)] * (decoder or videos) + [mean] * (not videos) + [_bias(kind)]
            yield f"| {' | '.join(row)} |"


def _mean(pruner: Pruner) -> str:
    counts = pruner.counts(VISUAL, SHAPE.decoder.layers)
    return f"{sum(counts) / len(counts):.0f}"


def built_in() -> dict[str, type[Pruner]]:
    """The methods of the package, by name."""
    return {n: k for n, k in methods().items() if k.__module__.startswith("pore.")}


def family_rows(found: Iterable[Support]) -> Iterator[str]:
    """The table of families."""
    found = list(found)
    kinds = {name: methods()[name] for name in found[0].limits if name in built_in()}
    tower = {name for name, kind in kinds.items() if (p := made(kind, KEEP)) and p.reads_tower}
    columns = ("family", "`model_type`", "a picture becomes", "videos", "methods in the tower")
    yield f"| {' | '.join(columns)} | not taken |\n|---|---|---|---|---|---|"
    for one in found:
        no = [name for name in one.limits if name not in one.takes]
        without = [name for name in no if name in tower]
        if len(without) == len(tower):
            in_tower = "no"
        else:
            in_tower = f"all but {', '.join(without)}" if without else "all"
        rest = ", ".join(name for name in no if name not in tower)
        types = ", ".join(f"`{kind}`" for kind in one.model_types)
        videos = "yes" if one.family.encodes_videos else "no"
        picture = PICTURES[one.family.name]
        yield f"| {one.family.name} | {types} | {picture} | {videos} | {in_tower} | {rest or '–'} |"


def reason_rows(found: Iterable[Support]) -> Iterator[str]:
    """The table of reasons: why methods are refused, and when they work all the same."""
    grouped: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in found:
        for name, limits in one.limits.items():
            for limit in limits:
                families = grouped.setdefault((limit.reason, limit.unless or "never"), {})
                families.setdefault(one.family.name, []).append(name)
    yield "| why not | it works where | which |\n|---|---|---|"
    for (reason, unless), families in grouped.items():
        same: dict[str, list[str]] = {}
        for family, names in families.items():
            same.setdefault(", ".join(names), []).append(family)
        which = "; ".join(f"{names} in {', '.join(where)}" for names, where in same.items())
        yield f"| {reason[0].upper()}{reason[1:]} | {unless} | {which} |"


def filled(text: str, mark: str, rows: Iterable[str]) -> str:
    """A page with these rows between its marks."""
    start, end = f"<!-- {mark}: python docs/method_pages.py -->\n", f"<!-- end of {mark} -->"
    before, _, rest = text.partition(start)
    if end not in rest:
        raise SystemExit(f"There is no {start.strip()} ... {end} on this page:\n{text[:200]}")
    return before + start + "\n".join(rows).strip("\n") + "\n" + rest[rest.index(end) :]


def pages() -> dict[Path, str]:
    """Every page as it should be."""
    found = support()
    new: dict[Path, str] = {}
    for name, kind in built_in().items():
        path = DOCS / "methods" / page_of(name)
        text = path.read_text(encoding="utf-8")
        new[path] = filled(text, "facts", facts(name, kind, found))
    listing, families = DOCS / "methods.md", DOCS / "families.md"
    new[listing] = filled(listing.read_text(encoding="utf-8"), "methods", index())
    text = filled(families.read_text(encoding="utf-8"), "families", family_rows(found))
    new[families] = filled(text, "reasons", reason_rows(found))
    return new


def main(arguments: list[str]) -> Any:
    """Write the pages, or say which are not as they should be."""
    stale = [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        return f"not as the registry has it: {', '.join(p.name for p in stale)}" if stale else 0
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
