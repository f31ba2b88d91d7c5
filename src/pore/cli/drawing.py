"""The picture of `pore generate --draw`: what was kept of every image, or of a video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore.errors import InputError

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.engine.prefill import ImageReport
    from pore.engine.pruner import Pruner


def check_draw(path: Path, shown: Sequence[Sample]) -> None:
    """Refuse a file that what is shown cannot be drawn in.

    Args:
        path: The file of --draw.
        shown: The images and videos.

    Raises:
        InputError: Says what to name instead.
    """
    from pore.plotting.frames import ANIMATIONS

    moving = [sample for sample in shown if sample.of_video]
    if moving and len(shown) > 1:
        raise InputError(
            "--draw shows what is kept of images, or of one video; here are a video and more."
        )
    if path.suffix.lower() in ANIMATIONS and not moving:
        raise InputError(
            f"{path} is for a video, and {shown[0].id} is an image; name a PNG file for --draw."
        )


def draw_kept(
    path: Path,
    model: Any,
    processor: Any,
    shown: Sequence[Sample],
    images: Sequence[ImageReport] | None,
    pruner: Pruner | None,
    title: str,
) -> None:
    """Draw what was kept of every picture of a prompt.

    Args:
        path: The file.
        model: The model.
        processor: Its processor.
        shown: The images, or one video.
        images: The report of every image in the prompt; None unpruned.
        pruner: The method; None unpruned.
        title: The title.

    Raises:
        PoreError: It cannot be drawn; says why.
        OSError: It cannot be written.
    """
    from pore import plotting
    from pore.data.coverage import coverage_of

    resize = None if pruner is None else pruner.resizing(model, processor)
    kept = None if images is None else [image.kept for image in images]
    if shown[0].of_video:
        _draw_frames(path, model, processor, shown[0], kept, pruner, title)
        return
    pictures, first = [], 0
    for sample in shown:
        picture, settings = sample.load_image(), {}
        if resize is not None:  # what the model was shown
            settings = dict(resize.settings)
            picture = picture if resize.picture is None else resize.picture(picture)
        covered = coverage_of(model, processor, picture, **settings)
        own = None if kept is None else kept[first : first + len(covered)]
        for there, image in zip(covered, (images or ())[first:], strict=False):
            if len(there.boxes) != image.seen:
                raise InputError(
                    f"{sample.id} has {image.seen} visual tokens beside other pictures and "
                    f"{len(there.boxes)} alone, so that their places are not known."
                )
        reports = (images or ())[first : first + len(covered)]
        first += len(covered)
        pictures.append(
            plotting.Seen(
                picture,
                covered,
                own,
                sample.id if len(shown) > 1 else None,
                merges=None if pruner is None else pruner.merges,
                extra=sum(image.extra for image in reports),
                averaged=_averaged(pruner, reports),
            )
        )
    plotting.save(plotting.layouts(pictures, title=title), path)


def _averaged(pruner: Pruner | None, reports: Sequence[ImageReport]) -> tuple[int, int] | None:
    """The grid on which a method averages an image; None for any other."""
    from pore.methods.downsample import Downsample, coarse_grid

    if not isinstance(pruner, Downsample) or len(reports) != 1 or reports[0].grid is None:
        return None
    return coarse_grid(reports[0].grid, len(reports[0].kept))


def _draw_frames(
    path: Path,
    model: Any,
    processor: Any,
    sample: Sample,
    kept: Sequence[Sequence[int]] | None,
    pruner: Pruner | None,
    title: str,
) -> None:
    from pore import plotting
    from pore.data.seen_frames import seen_frames

    merges = None if pruner is None else pruner.merges
    frames = plotting.frames_kept(seen_frames(model, processor, sample), kept, merges)
    if path.suffix.lower() in plotting.ANIMATIONS:
        plotting.animated(frames, path)
    else:
        plotting.save(plotting.strip(frames, title=title), path)


def title_of(
    question: str, answer: str, pruner: Pruner | None, images: Sequence[ImageReport] | None
) -> str:
    """The question, the answer, the method and what it left of the visual tokens."""
    from pore.plotting.labels import budget_label, label

    said = f"{question} “{answer}”"
    if pruner is None or images is None:
        return f"{said} · unpruned"
    corrected = getattr(pruner, "reweight", None) is not None
    named = label(pruner.name, "measured" if corrected else None)
    left = sum(len(image.kept) + image.extra for image in images)
    seen = sum(image.seen - image.hidden for image in images)
    budget = budget_label(getattr(pruner, "keep", None))
    return f"{said} · {named}, {budget}: {left} of {seen} visual tokens"
