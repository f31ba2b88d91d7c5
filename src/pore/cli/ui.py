"""`pore ui`: a page on which people ask a model, and see what is kept of their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore.cli.about import command_line, name_of, setup_of
from pore.cli.options import Allow, Loading, Model, Reweight, takes
from pore.cli.printing import say
from pore.embedded import EMBEDDED

if TYPE_CHECKING:
    from pore.engine.corrections import Correction
    from pore.serving.measured import Measured
    from pore.serving.page import Example, PageApp

_FITTED = 128  # scenes that the embedded model's P is measured on
_LAYER = 2

# Questions of the test scenes, and how the embedded model answers them with the usual settings.
EXAMPLES = {
    6: "FastV errs at a quarter of the tokens, and FastV + P does not.",
    58: "FastV errs at a quarter of the tokens, and FastV + P does not.",
    56: "Here P does harm: FastV is right without it.",
    25: "At a quarter of the tokens, FastV errs with P and without.",
    0: "At a quarter of the tokens, FastV is right with P and without.",
}


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore ui`."""

    model: Model = EMBEDDED
    reweight: Reweight = None
    allow: Allow = None
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8080
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture.")] = 64_000_000
    max_mib: Annotated[int, typer.Option(min=1, help="MiB of a question with its picture.")] = 32
    max_waiting: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 16


@takes(Options)
def ui(options: Options) -> None:
    """Serve a page: drop a picture, ask, and see what is kept.

    Needs `pip install 'pore-vlm[ui]'`. The answers of the model unpruned, pruned, and pruned after
    a correction of the attention stand side by side. For the embedded model P is measured at the
    start, on scenes of its own. The page loads nothing from elsewhere, and keeps nothing.

    Examples:

        pore ui

        pore ui -m llava-hf/llava-1.5-7b-hf --reweight llava.json
    """
    from pore.plotting.style import style

    with style():  # says so where figures cannot be drawn
        from pore.serving.running import Server, listening
    with listening(options.host, options.port) as sockets:
        server = Server(_app(options), sockets)
        say(f"The page is at http://{options.host}:{options.port}. Ctrl-C stops it.")
        server.run()


def _app(options: Options) -> PageApp:
    from pore.data.loading import load_model
    from pore.evaluation.reweighting import ROPE, UNCALIBRATED
    from pore.serving.looking import Viewer
    from pore.serving.page import PageApp
    from pore.serving.requests import Limits
    from pore.serving.served import Served

    model, processor = load_model(options.model, **options.how)
    limits = Limits(
        body_bytes=options.max_mib << 20,
        pixels=options.max_pixels,
        new_tokens=options.max_new_tokens,
        waiting=options.max_waiting,
    )
    served = Served(options.model, model, processor, limits=limits)
    served.try_out()
    loaded = _corrections(options, model, processor)
    uncalibrated = [name for name in (ROPE, *UNCALIBRATED) if name != options.reweight]
    viewer = Viewer(served, loaded, uncalibrated)
    name = name_of(options.model)
    return PageApp(viewer, name, _examples(options.model, model), command_line(), setup_of(model))


def _corrections(
    options: Options, model: Any, processor: Any
) -> Mapping[str, Sequence[Correction] | Measured]:
    """The corrections that are loaded or measured, by the names that the page gives them."""
    from pore.data.sources import load_samples
    from pore.evaluation.reweighting import ROPE, UNCALIBRATED, biases_named
    from pore.methods.fastv import FastV
    from pore.serving.measured import Measured

    if options.reweight is not None:
        found = biases_named(options.reweight, options.allow or (), model, processor, [])
        assert found is not None
        named = options.reweight in (ROPE, *UNCALIBRATED)
        return {options.reweight if named else "P": found}
    if options.model != EMBEDDED:
        return {}
    say(f"Measuring P of the embedded model at K = {_LAYER} on {_FITTED} scenes ...")
    measured = Measured(model, processor, list(load_samples("embedded:calibration", limit=_FITTED)))
    measured.of(FastV(keep=1.0, layer=_LAYER))  # what the page begins with
    return {"P": measured}


def _examples(name: str, model: Any) -> list[Example]:
    """Scenes of the embedded model, which others can be asked about too."""
    from pore.data.sources import load_samples
    from pore.families.registry import family_of
    from pore.serving.page import Example

    sizes = "" if family_of(model).common_grid(model) is not None else ":mixed"
    scenes = list(load_samples(f"embedded:test{sizes}", limit=max(EXAMPLES) + 1))
    return [
        Example(scenes[i].load_image(), scenes[i].question, hint if name == EMBEDDED else "")
        for i, hint in EXAMPLES.items()
    ]
