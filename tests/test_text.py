"""Text of users is shown as it is, wherever it is shown."""

from __future__ import annotations

import ast
import csv
import inspect
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from rich.text import Text as RichText

import pore
from helpers.nasty import NASTY, obeyed
from pore import plotting
from pore._text import Html, Screen, cell, for_csv, for_figure, for_html, for_terminal, visible
from pore.bench.results import Spread
from pore.bench.results import table as speed_table
from pore.data.coverage import Coverage
from pore.evaluation import page
from pore.evaluation.outcome import Answer, Outcome, compare
from pore.evaluation.records import FIELDS, table, to_csv

SOURCE = Path(pore.__file__).parent
ANY = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(NASTY)


# -- the room itself ------------------------------------------------------------------------------


@given(ANY)
def test_what_is_shown_is_obeyed_by_nothing(text: str) -> None:
    for shown in (visible(text), for_figure(text), for_csv(text)):
        assert not obeyed(shown)
        assert "\n" not in shown
        shown.encode()  # no half of a character is left
    assert not obeyed(for_terminal(text)) - {"\t"}
    assert for_terminal(text).count("\n") == text.count("\n")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "M"]) | st.just(" ")))
def test_what_can_be_seen_stays(text: str) -> None:
    assert visible(text) == for_terminal(text) == text


def test_what_is_obeyed_is_spelled_out() -> None:
    assert visible("a\x1b[31m\u202e\ud800\n") == "a\\x1b[31m\\u202e\\ud800\\n"
    assert visible("👩\u200d🚀") == "👩\u200d🚀"


@given(ANY, st.integers(10, 60), st.integers(1, 4))
def test_text_of_a_figure_has_its_room(text: str, width: int, lines: int) -> None:
    shown = for_figure(text, width, lines).split("\n")
    assert len(shown) <= lines
    assert max(map(len, shown)) <= width + 1
    whole = visible(" ".join(text.split()))
    kept = "".join(shown).replace(" ", "")
    assert whole.replace(" ", "").startswith(kept.removesuffix("…"))
    if not kept.endswith("…"):
        assert kept == whole.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@x", "'@x"),
        ("\t=1", "\\t=1"),
        (" =1", "' =1"),
        ("＝1", "'＝1"),
        ("kind.=1", "kind.=1"),
        ("a-b", "a-b"),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_no_cell_begins_a_formula(text: Any, shown: Any) -> None:
    assert for_csv(text) == shown


@given(ANY)
def test_pages_show_text_as_text(text: str) -> None:
    data = io.StringIO()
    parser = HTMLParser()
    parser.handle_data = data.write  # type: ignore[assignment,method-assign]
    parser.handle_starttag = lambda *_: pytest.fail("a tag")  # type: ignore[method-assign]
    parser.feed(for_html(text))
    parser.close()
    assert data.getvalue() == visible(text, "\n\t")
    attribute: dict[str, str | None] = {}
    parser = HTMLParser()
    parser.handle_starttag = lambda _, pairs: attribute.update(pairs)  # type: ignore[method-assign]
    parser.feed(f"<img alt='{for_html(text)}'>")
    assert attribute == {"alt": visible(text, "\n\t")}
    assert for_html(Html("<b>")) == "<b>"


@given(ANY)
@example("[red]x[/red] [/] :warning: 3.14 'text'")
@example("\u2e80\tfull-width characters take two columns, which a tab counts")
def test_a_screen_shows_strings_as_they_are(text: str) -> None:
    shown = RichText(for_terminal(text))
    shown.expand_tabs(8)
    for terminal in (False, True):
        screen = Screen(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
        screen.print(text, soft_wrap=True)
        assert screen.file.getvalue() == shown.plain + "\n"  # type: ignore[attr-defined]


# -- figures --------------------------------------------------------------------------------------

GRID, N = (4, 6), 24
MEAN = 1e-3 * np.exp(0.05 * np.arange(N)) * (1 + 0.1 * np.cos(np.arange(N)))
IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def result(text: str, **given: Any) -> dict[str, Any]:
    return {
        "method": text,
        "reweight": None,
        "keep": text,
        "flops": 1e9,
        "accuracy": 0.5,
        "ci": [0.4, 0.6],
        "acts_in": "tower",
        "looks_at": [1],
        "guide": text,
        "third": text,
        "difference": 0.1,
        "p_mcnemar": 0.5,
        **given,
    }


def biased(text: str) -> Any:
    bias = pore.PositionBias.fit(MEAN, grid=GRID)
    object.__setattr__(bias, "kind", text)  # which its own check would refuse
    return bias


def layout(text: str) -> Figure:
    boxes = torch.tensor([[0.0, 0, 48, 32]])
    coverage = Coverage((48, 32), boxes, torch.zeros(1, dtype=torch.long), boxes.double())
    return plotting.layout(IMAGE, [coverage], title=text)


def many(texts: Sequence[str]) -> Figure:
    methods = [*texts, *(f"{text}{i}" for i in (1, 2) for text in texts)]
    return plotting.accuracy_over_flops([*map(result, methods), result("unpruned")])


DRAWN: dict[str, Callable[[Sequence[str]], Figure]] = {
    "figure1": lambda texts: plotting.figure1(MEAN, biased(texts[0])),
    "figure2": lambda texts: plotting.figure2(MEAN, biased(texts[0]), 0.1 * MEAN),
    "accuracy_over_flops": lambda texts: plotting.accuracy_over_flops([*map(result, texts)]),
    "accuracy_over_flops, many": many,
    "differences": lambda texts: plotting.differences(
        [*map(result, texts), *(result(text, third=None) for text in texts)]
    ),
    "kept_tokens": lambda texts: plotting.kept_tokens(
        IMAGE,
        [plotting.Panel(text, True, (0, 1)) for text in texts],
        GRID,
        title=" ".join(text[:20] for text in texts),
    ),
    "layout": lambda texts: layout(" ".join(text[:20] for text in texts)),
}
CHUNKS = [NASTY[i : i + 4] for i in range(0, len(NASTY), 4)]


def test_every_function_that_draws_is_tried() -> None:
    public = {
        name
        for name, function in inspect.getmembers(plotting, inspect.isfunction)
        if inspect.signature(function).return_annotation == "Figure" and not name.startswith("_")
    }
    assert public == {name.split(",")[0] for name in DRAWN}


@pytest.mark.parametrize("texts", CHUNKS)
@pytest.mark.parametrize("name", DRAWN)
def test_figures_show_text_as_it_is(name: str, texts: Sequence[str]) -> None:
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True}):
        warnings.simplefilter("error")
        figure = DRAWN[name](texts)
        content = plotting.to_png(figure, dpi=30)
        shown = [one for one in figure.findobj(Text) if one.get_text()]
        assert not any(one.get_parse_math() or one.get_usetex() for one in shown)
        assert not any(obeyed(one.get_text()) for one in shown)
    with PIL.Image.open(io.BytesIO(content)) as image:
        assert max(image.size) < 2000
    for text in texts if name.startswith(("accuracy", "diff", "kept")) else ():
        begin = for_figure(text, 20).strip()[:5].strip()
        assert any(begin in one.get_text() for one in shown)


def test_legends_leave_nothing_out() -> None:
    (axis,) = plotting.accuracy_over_flops([result("_m")]).axes
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [" _m"]


@settings(deadline=None, max_examples=25)
@given(ANY)
def test_any_question_can_be_drawn(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plotting.to_png(DRAWN["kept_tokens"]([text]), dpi=20)


# -- tables, CSV and pages ------------------------------------------------------------------------


def outcome(text: str, reweight: bool = False) -> Outcome:
    """An outcome whose every text is this one."""
    pruner: Any = SimpleNamespace(
        name=text,
        keep=0.5,
        layer=2,
        reweight=SimpleNamespace(kind=text) if reweight else None,
        looks_at=[1],
        stages=lambda: [SimpleNamespace(layer=1)],
    )
    answer = Answer(text, text, text, text, not reweight, text, text, ((0,),), 1, 0, 1.0)
    return Outcome(pruner, (answer,), budget=text)


def plain_print(shown: Any) -> str:
    """What a console of the user's own, with all that rich does by default, makes of a table."""
    console = Console(width=10_000, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_tables_show_text_as_it_is(text: str) -> None:
    records = [outcome(text).record() | {"guide": text}]
    printed = plain_print(table(records, title=text))
    assert not obeyed(printed)
    for line in visible(text, "\n").splitlines():
        # As the title, the budget and the method's name; as kind and third only its beginning.
        assert printed.count(line.strip()) >= 3
        assert line[:5].strip() in printed


@pytest.mark.parametrize(("right", "shown"), [(0, "0.0 [0.0, 35.4]"), (7, "100.0 [64.6, 100.0]")])
def test_intervals_are_printed_whole(right: int, shown: str, tmp_path: Path) -> None:
    """At the ends a Wilson interval lies on one side: 0 of 7 is no 0.0 ± 17.7."""
    one = outcome("m")
    answers = tuple(replace(one.answers[0], right=bool(right)) for _ in range(7))
    records = [replace(one, answers=answers).record()]
    assert shown in plain_print(table(records))
    content = str(page._table(records))
    assert shown in re.sub("<[^>]*>", "", content)
    survey = SimpleNamespace(records=[records[0], records[0]], taught=None, differences=[])
    assert shown in page.findings(survey)[-1]  # type: ignore[arg-type]
    row = dict(zip(*csv.reader(io.StringIO(to_csv(records))), strict=True))
    assert f"{100 * float(row['ci_low']):.1f}, {100 * float(row['ci_high']):.1f}]" in shown


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_the_table_of_speeds_shows_text_as_it_is(text: str) -> None:
    spread = Spread((1.0,))
    timing = SimpleNamespace(prefill=spread, ttft=spread, decode=None, cache=1.0, peak_memory=None)
    setting = SimpleNamespace(
        name=text, tokens=[1], timing=timing, attainable=None, flops=SimpleNamespace(total=1.0)
    )
    workload = SimpleNamespace(batch_size=1, text_before=1, visual=1, text_after=1, repeats=1)
    found: Any = SimpleNamespace(
        model={"name": text, "dtype": text, "attention": text},
        workload=workload,
        hardware={"cpu": text},
        settings=[setting],
    )
    printed = plain_print(speed_table(found))
    assert not obeyed(printed)
    assert visible(text, "\n").splitlines()[0].strip()[:30] in printed


@settings(deadline=None)
@given(ANY, ANY)
def test_csv_holds_no_formula(text: str, other: str) -> None:
    record: dict[str, Any] = dict.fromkeys(FIELDS, text)
    record |= {"ci": [-0.1, 0.2], "looks_at": [1, 2], "accuracy": -0.5}
    record |= {f"accuracy_by_{group}": {text: 0.5, other: 0.25} for group in ("kind", "third")}
    content = to_csv([record])
    assert not obeyed(content)
    headings, values = csv.reader(io.StringIO(content))
    assert len(headings) == len(values) == len(FIELDS) - 1 + (2 if text == other else 4)
    row = dict(zip(headings, values, strict=True))
    assert (row["ci_low"], row["accuracy"], row["looks_at"]) == ("-0.1", "-0.5", "1 2")
    numbers = {"ci_low", "accuracy"}
    for heading, value in row.items():
        assert not heading.strip().startswith(tuple("=+-@\t\r"))
        assert heading in numbers or not value.strip().startswith(tuple("=+-@\t\r"))
    assert row["method"] in (text, visible(text), f"'{visible(text)}")


class Tags(HTMLParser):
    """The tags of a page, with their attributes' names, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(text: str, folder: Path) -> str:
    """The page of a demo, all of whose texts are this one."""
    for name in ("figure1", "figure2", "figure3", "example"):
        (folder / f"{name}.png").write_bytes(b"png")
    bias = pore.PositionBias.fit(MEAN, grid=GRID)
    first, second = outcome(text), outcome(text, reweight=True)
    found: Any = SimpleNamespace(
        records=[one.record() for one in (first, second)],
        differences=[compare(first, second)],
        examples=[SimpleNamespace(path=folder / "example.png", title=text)],
        settings=SimpleNamespace(example_keep=text, layer=2, seed=0),
        calibration=SimpleNamespace(count=1),
        bias=bias,
        rope=SimpleNamespace(parameters={"text_tokens": 3}),
    )
    about = page.About(text, text, text, text, {text: text}, text)
    return page.write(found, about, folder).read_text(encoding="utf-8")


def survey(text: str, folder: Path) -> str:
    """The page of a survey, all of whose texts are this one."""
    for name in ("accuracy", "pore"):
        (folder / f"{name}.png").write_bytes(b"png")
    first, second = outcome(text), outcome(text, reweight=True)
    bias = pore.PositionBias.fit(MEAN, grid=GRID)
    object.__setattr__(bias.provenance, "host", text)  # which may refuse half a character itself
    found: Any = SimpleNamespace(
        records=[one.record() | {"guide": text} for one in (first, second)],
        differences=[compare(first, second), compare(first, second, third=text)],
        settings=SimpleNamespace(average=False, kind=text, seed=0),
        layers=5,
        visual=4,
        biases={text: [bias]},
        left_out=[text],
        reasons=[text],
        taught=1,
    )
    about = page.About(text, text, text, text, {text: text})
    return page.write_survey(found, about, folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", NASTY, ids=repr)
@pytest.mark.parametrize("write", [report, survey])
def test_pages_are_what_they_are_with_harmless_text(
    write: Callable[[str, Path], str], text: str, tmp_path: Path
) -> None:
    content = write(text, tmp_path)
    found, harmless = Tags(content), Tags(write("harmless", tmp_path))
    assert found.tags == harmless.tags
    assert not obeyed(content) - {"\t"}
    shown = visible(text, "\n\t")
    assert found.text.count(shown) >= harmless.text.count("harmless")


# -- nothing goes around --------------------------------------------------------------------------


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_no_module_has_a_console_markup_or_html_of_its_own(path: Path) -> None:
    if path.name == "_text.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {name.name for name in node.names}
            assert node.module not in ("rich.markup", "html"), "text goes through pore._text"
            assert not (node.module == "rich.console" and "Console" in names), (
                "use pore._text.Screen"
            )
            assert not (node.module == "rich" and "print" in names), "use pore._text.Screen"
            if (node.module or "").startswith("matplotlib"):
                assert path.parent.name == "plotting", "figures are drawn in the style of plotting"
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name != "print", "use pore._text.Screen"
        assert not name.endswith(("from_markup", "from_ansi")), "text is no markup"
        if name == "typer.echo":  # as JSON, which has no controls, or what we wrote ourselves
            assert ast.unparse(call.args[0]).startswith(("json.dumps(", 'f"pore {version('))
        if name.endswith("TextColumn") and "task." in ast.unparse(call.args[0]):
            markup = {word.arg: ast.unparse(word.value) for word in call.keywords}["markup"]
            assert markup == "False", "text is no markup"


def test_cells_are_texts_of_rich() -> None:
    assert cell("[red]\x1b").plain == "[red]\\x1b"
