"""Pictures of what methods keep, for the report of the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pore import plotting
from pore.data.coverage import coverage_of
from pore.data.samples import Sample
from pore.data.seen_frames import seen_frames
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.results import Example, KeptBy
from pore.families.registry import family_of
from pore.methods.downsample import Downsample, coarse_grid

Kept = Sequence[Sequence[int]]
"""For every image of a prompt, raster indices of the tokens that stay."""


def chosen(asked: Sequence[Sample], host: Outcome, reweighted: Outcome) -> dict[int, str]:
    """The first question of every kind, and the first ones on which FastV and PoRe disagree.

    Args:
        asked: The samples.
        host: The answers of FastV.
        reweighted: Those of FastV + PoRe.

    Returns:
        Why each is shown, by the place of the sample.
    """
    found: dict[int, str] = {}
    for i, sample in enumerate(asked):
        if sample.kind is not None and sample.kind not in {asked[j].kind for j in found}:
            found[i] = f"the first question of kind “{sample.kind}”"
    for wanted, title in (
        ((False, True), "the first questions that only PoRe gets right"),
        ((True, False), "the first questions that only plain FastV gets right"),
    ):
        pairs = zip(host.right, reweighted.right, strict=True)
        matching = [i for i, pair in enumerate(pairs) if pair == wanted and i not in found]
        found |= dict.fromkeys(matching[:2], title)
    return found


def examples(
    model: Any, processor: Any, asked: Sequence[Sample], shown: Sequence[Outcome], folder: Path
) -> Iterator[Example]:
    """Draw the chosen questions.

    Where all images have one grid, a picture shows all methods side by side, and what Downsample
    averages. For images of any size there is a picture for every method that drops tokens: with
    tiles, the tokens of an image show parts of it that overlap. Likewise for videos.

    Args:
        model: The model.
        processor: Its processor.
        asked: The samples.
        shown: What is drawn of each: the answers of FastV, of FastV + PoRe, and of other methods.
        folder: Where the pictures go.

    Yields:
        The examples, once they are written.

    Raises:
        PoreError: Which part of an image a token shows is not known.
    """
    grid = family_of(model).common_grid(model)
    for count, (i, title) in enumerate(chosen(asked, shown[0], shown[1]).items(), 1):
        sample, place = asked[i], folder / f"{count:02}"
        said = f"{sample.question}  →  {sample.answer}"
        if grid is not None:
            picture = seen_image(model, processor, sample.load_image())
            panels = [_panel(outcome, outcome.answers[i], grid) for outcome in shown]
            figure = plotting.kept_tokens(picture, panels, grid, title=said)
            paths = [plotting.save(figure, place.with_suffix(".png"), dpi=120)]
            kept = [
                _kept(outcome, i, *plotting.kept_picture(picture, panel, grid))
                for outcome, panel in zip(shown, panels, strict=True)
            ]
            whole = plotting.to_web(picture)
            kept.append(KeptBy("The image", "", None, "as the model sees it", whole))
        else:
            draw, paths, kept = _drawing(model, processor, sample), [], []
            for number, outcome in enumerate(shown, 1):
                if not isinstance(outcome.pruner, Downsample):
                    answer = outcome.answers[i]
                    sign = "✓" if answer.right else "✗"
                    figure = draw(answer.kept, f"{outcome.label}: “{answer.given}” {sign}")
                    paths.append(
                        plotting.save(figure, folder / f"{count:02}-{number}.png", dpi=120)
                    )
                    kept.append(_kept(outcome, i, paths[-1].read_bytes(), ""))
        rights = shown[0].right[i], shown[1].right[i]
        yield Example(
            title, said, tuple(paths), tuple(kept), rights == (False, True), grid is not None
        )


def _kept(outcome: Outcome, i: int, picture: bytes, said: str) -> KeptBy:
    answer = outcome.answers[i]
    return KeptBy(outcome.label, f"“{answer.given}”", answer.right, said, picture)


def _drawing(model: Any, processor: Any, sample: Sample) -> Callable[[Kept, str], Any]:
    """What draws an image or a video of a sample, from what is kept of it and a title."""
    if sample.of_video:
        seen = seen_frames(model, processor, sample)
        return lambda kept, title: plotting.strip(plotting.frames_kept(seen, kept), title=title)
    picture = sample.load_image()
    covered = coverage_of(model, processor, picture)
    return lambda kept, title: plotting.layout(picture, covered, kept, title=title)


def seen_image(model: Any, processor: Any, image: Image.Image) -> Image.Image:
    """The part of an image that its visual tokens show, black where they show padding.

    Args:
        model: A model whose images all have one grid.
        processor: Its processor.
        image: The image.

    Returns:
        What the vision tower sees, in the resolution of the image.

    Raises:
        PoreError: As `coverage_of`.
    """
    frame = coverage_of(model, processor, image)[0].frames[0]
    left, top, right, bottom = (round(side) for side in frame.tolist())
    return image.crop((left, top, right, bottom))


def _panel(outcome: Outcome, answer: Answer, grid: tuple[int, int]) -> plotting.Panel:
    kept = answer.kept[0]
    averages = isinstance(outcome.pruner, Downsample)
    return plotting.Panel(
        f"{outcome.label}: “{answer.given}”",
        answer.right,
        kept,
        cells=coarse_grid(grid, len(kept)) if averages else None,
    )
