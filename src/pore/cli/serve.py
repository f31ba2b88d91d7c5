"""`pore serve`: a model behind OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore.cli.checks import check_method, check_reweight
from pore.cli.guides import check_guide, guiding_for
from pore.cli.options import Guide, Loading, Pruning, budgets, method_of, takes
from pore.cli.printing import say
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.engine.corrections import Correction
    from pore.engine.pruner import Pruner
    from pore.evaluation.guided import Guiding
    from pore.serving.app import App
    from pore.serving.requests import Limits
    from pore.serving.served import Served


@dataclass(frozen=True)
class Options(Loading, Pruning):
    """The options of `pore serve`."""

    model: Annotated[
        str, typer.Argument(help="Hub id, folder, or 'embedded': the model shipped here.")
    ] = "embedded"
    guide: Guide = None
    unpruned: Annotated[bool, typer.Option("--unpruned", help="Prune nothing.")] = False
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. [default: as MODEL]")
    ] = None
    allow_host: Annotated[
        list[str],
        typer.Option(
            help="Host that images are fetched from, where requests name them by http(s) URLs; "
            "'*' allows all. Repeatable. [default: none]"
        ),
    ] = field(default_factory=list)
    allow_folder: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder whose images requests may name by file URLs. [default: none]",
        ),
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, also of requests that ask for no length.")
    ] = 1024
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request.")] = 16
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Pixels of the images of a request, in all.")
    ] = 64_000_000
    max_mib: Annotated[
        int, typer.Option(min=1, help="MiB of a request, and of an image that is fetched.")
    ] = 32
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests at a time; others get 503.")] = (
        256
    )


def _check(options: Options) -> None:
    """Refuse options that contradict each other, before a model is loaded."""
    check_guide(options)
    of_method = ("keep", "layer", "reweight", "allow", "normalize", "settings", "guide")
    given = [name for name in of_method if getattr(options, name)]
    if options.unpruned and (given or options.average):
        raise InputError("With --unpruned there is no method to set up; leave its options out.")
    budgets([options.keep] if options.keep else None, options.settings)
    check_method(options.method, options.settings)
    check_reweight(options.reweight)


@takes(Options, check=_check, config=True)
def serve(options: Options) -> None:
    """Serve a pruned model behind OpenAI's chat completions.

    Needs `pip install 'pore-vlm[serve]'`. A request may name a budget of its own: "keep": 64, or
    "keep": "25%". Ctrl-C or SIGTERM ends the server once it has answered what it has begun.

    Examples:

        pore serve --keep 25%

        pore serve llava-hf/llava-1.5-7b-hf --method FastV --keep 128 --reweight llava.json
    """
    from pore.serving.running import Server, listening

    with listening(options.host, options.port) as sockets:
        served = _served(options)
        served.try_out()
        server = Server(_app(options, served), sockets)
        usual = served.pruner(None)
        say(
            f"Serving {served.name}, {'unpruned' if usual is None else repr(usual)}, at "
            f"http://{options.host}:{options.port}/v1. Ctrl-C stops it."
        )
        server.run()


def _app(options: Options, served: Served) -> App:
    from pore.serving.app import App
    from pore.serving.pictures import Sources

    hosts = tuple(host.lower() for host in options.allow_host)
    return App(served, Sources(hosts, options.allow_folder))


def _served(options: Options) -> Served:
    """The model, and the method at any budget."""
    from pore.data.loading import load_model
    from pore.evaluation.reweighting import biases_named
    from pore.serving.served import Served

    (keep,) = budgets([options.keep] if options.keep else None, options.settings)
    model, processor = load_model(options.model, **options.how)
    name = options.name or options.model
    limits = _limits(options)
    if options.unpruned:
        return Served(name, model, processor, limits=limits)
    biases = biases_named(options.reweight, options.allow or (), model, processor, [])
    guiding = guiding_for(options, model, processor)
    method = partial(_method, options, model, biases, guiding)
    return Served(name, model, processor, method, keep, limits)


def _limits(options: Options) -> Limits:
    from pore.serving.requests import Limits

    return Limits(
        body_bytes=options.max_mib << 20,
        images=options.max_images,
        pixels=options.max_pixels,
        new_tokens=options.max_new_tokens,
        waiting=options.max_waiting,
    )


def _method(
    options: Options,
    model: Any,
    biases: Sequence[Correction] | None,
    guiding: Guiding | None,
    keep: int | float,
) -> Pruner:
    """The method at a budget."""
    from pore.evaluation.reweighting import reweighted

    pruner = method_of(options, model, keep, guide=guiding)
    return pruner if biases is None else reweighted(pruner, biases)
