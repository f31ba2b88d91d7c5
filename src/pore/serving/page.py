"""The page on which people ask a model, and see what was kept of their picture.

GET /   GET /ui.css   GET /ui.js   POST /ask
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources

import PIL.Image
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from pore._numbers import number
from pore._page import address, filled, html, items, joined, part
from pore._text import Html
from pore.engine.report import steps_of
from pore.serving.asked import Asked
from pore.serving.counted import CountedApp, answered, begun, body, unless_gone
from pore.serving.looking import Looking, Seen, Side, Viewer
from pore.serving.pictures import Sources

_ASK = "/ask"

_FILES = {"ui.css": "text/css", "ui.js": "text/javascript"}

# Nothing but what this server sends, so that the page works offline and tells nobody of itself.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Example:
    """A picture and a question to begin with.

    Attributes:
        image: The picture.
        question: The question.
        hint: What there is to see.
    """

    image: PIL.Image.Image
    question: str
    hint: str


class PageApp(CountedApp):
    """The application, as ASGI servers call it.

    What a visitor asks is in the request alone, and what is shown in its answer alone, so that
    visitors cannot see each other's settings or pictures.

    Args:
        viewer: What answers.
        model: What the model is called.
        examples: Pictures and questions to begin with, at least one.
        command: The command line that serves the page.
        setup: Hardware, versions and settings, in words by name.
    """

    def __init__(
        self,
        viewer: Viewer,
        model: str,
        examples: Sequence[Example],
        command: str,
        setup: Mapping[str, str],
    ) -> None:
        routes = [
            Route("/", self._page),
            Route(_ASK, self._ask, methods=["POST"]),
            *(Route(f"/{name}", self._file) for name in _FILES),
        ]
        super().__init__(viewer.served, _ASK, routes)
        self._viewer = viewer
        self._sources = Sources()
        self._text = _form(viewer, model, examples, command, setup)
        # One thread runs the model: its context is entered by one question at a time.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="pore-asking")

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(self._text, headers=_HEADERS)

    async def _file(self, request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        file = resources.files("pore").joinpath(f"templates/{name}")
        return Response(file.read_bytes(), media_type=_FILES[name], headers=_HEADERS)

    async def _ask(self, request: Request) -> Response:
        return await answered(self._answer(request))

    async def _answer(self, request: Request) -> Response:
        shown = asyncio.ensure_future(self._shown(request, body(request)))
        begun(request, shown)
        return HTMLResponse(await unless_gone(request, shown), headers=_HEADERS)

    async def _shown(self, request: Request, data: bytes) -> Html:
        limits = self.served.limits
        # Not on the thread of all requests, as pictures are large.
        asked = await asyncio.to_thread(Asked.read, data, limits)
        file = await asyncio.to_thread(self._sources.read, asked.image, limits)
        looking = Looking(self._viewer, replace(asked, image=""), file)
        begun(request, looking)
        return await asyncio.get_running_loop().run_in_executor(self._asking, _shown, looking)


def _form(
    viewer: Viewer,
    model: str,
    examples: Sequence[Example],
    command: str,
    setup: Mapping[str, str],
) -> str:
    """The page before anything is asked."""
    usual = "FastV" if "FastV" in viewer.methods else viewer.methods[0]
    first = examples[0]
    return filled(
        "ui.html",
        f"PoRe on {model}",
        command=command,
        setup=setup,
        sortable=False,  # it has no tables of results, and allows no script but its own
        model=model,
        examples=joined(_example(number, one) for number, one in enumerate(examples, 1)),
        picture=address(_png(first.image)),
        question=first.question,
        hint=first.hint,
        methods=_options(viewer.methods, usual),
        corrections=_options(viewer.corrections, viewer.corrections[0]),
    )


def _example(number: int, example: Example) -> Html:
    return html(
        "<button type='button' data-question='{}' data-hint='{}' aria-pressed='{}'>"
        "<img src='{}' alt='Example {}: {}'></button>",
        example.question,
        example.hint,
        "true" if number == 1 else "false",
        address(_png(example.image)),
        number,
        example.question,
    )


def _options(names: Sequence[str], usual: str) -> Html:
    return joined(
        html("<option selected>{}</option>" if name == usual else "<option>{}</option>", name)
        for name in names
    )


def _png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _shown(looking: Looking) -> Html:
    """What the page shows of a question."""
    seen = looking.see()
    settings = [side.settings for side in seen.sides if side.settings is not None]
    return part(
        "seen.html",
        said=". ".join(f"{side.title}: {side.answer}" for side in seen.sides),
        sides=joined(_side(side, seen.sides[0]) for side in seen.sides),
        layers=_layers(seen),
        attention=_attention(seen),
        notes=items(seen.notes),
        settings=settings[-1],
    )


def _side(side: Side, unpruned: Side) -> Html:
    """One of the answers."""
    left = f"{side.left} of {unpruned.seen}" if side is not unpruned else f"{side.seen}"
    if side.extra:
        left += f", {side.extra} of no one patch"
    rows = {
        "visual tokens": left,
        "FLOPs": "unknown" if side.flops is None else f"{number(side.flops, 1e9)} G",
        "prefill": f"{side.prefill_ms:.1f} ms",
        "answer": f"{side.whole_ms:.1f} ms",
    }
    kept = "" if side.kept is None else html("<img src='{}' alt='{}'>", address(side.kept), left)
    cells = joined(html("<dt>{}</dt><dd>{}</dd>", *each) for each in rows.items())
    return html(
        "<article><h3>{}</h3><p class='answer'>{}</p>{}<dl>{}</dl></article>",
        side.title,
        side.answer or "(an empty answer)",
        kept,
        cells,
    )


def _layers(seen: Seen) -> Html:
    """A column for every decoder layer, of the tokens that enter it."""
    unpruned, pruned = seen.sides[0], seen.sides[-1]
    top = max(unpruned.tokens)
    columns = joined(
        html(
            "<span style='height:{}%'><i style='height:{}%'></i></span>",
            round(100 * full / top, 2),
            round(100 * left / full, 2),
        )
        for full, left in zip(unpruned.tokens, pruned.tokens, strict=True)
    )
    said = (
        f"Unpruned: {steps_of(unpruned.tokens)}. {pruned.title}: {steps_of(pruned.tokens)}. "
        "In brackets, the decoder layers; text is counted too."
    )
    return html(
        "<figure><div class='layers' role='img' aria-label='{}'>{}</div>"
        "<figcaption>{}</figcaption></figure>",
        said,
        columns,
        said,
    )


def _attention(seen: Seen) -> Html:
    if seen.attention is None:
        return Html("")
    return html(
        "<h3>Attention that ranks</h3><figure class='attention'><img src='{}' alt='{}'>"
        "<figcaption>Of decoder layer {} in the unpruned model. What gets most is kept; where there"
        " is a correction, that is judged after it.</figcaption></figure>",
        address(seen.attention),
        "Maps of the attention on the picture, before and after the correction",
        seen.layer,
    )
