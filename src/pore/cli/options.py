"""Options of the commands: names and help texts, how values are read, and how commands get them.

A command takes one frozen dataclass; `takes` makes a typer parameter of every field:

    @dataclass(frozen=True)
    class Options:
        model: Model = "embedded"
        keep: Keeps = field(default_factory=lambda: ["50%", "25%"])

    @takes(Options)
    def demo(options: Options) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from pore.cli import completing
from pore.cli.config_file import Config, SaveConfig, given_of, names_of, save
from pore.cli.placed import model_of, placed
from pore.cli.verbosity import CHOSEN, Debug, Quiet, Verbose, choose
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.calibration.fits import FitKind
    from pore.engine.pruner import Pruner
    from pore.evaluation.metrics import Metric as ScoringRule

_Options = TypeVar("_Options")

LARGEST_SEED = 2**63 - 1

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        autocompletion=completing.models,
        help="Hub id, folder, or one of the models shipped here: 'embedded', 'embedded-video'.",
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda:0, mps, ...; 'auto' takes the accelerator, if there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        autocompletion=completing.one_of("auto", "float32", "float16", "bfloat16"),
        help="float32, float16, bfloat16; 'auto' takes the checkpoint's own.",
    ),
]
Attn = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing.one_of("sdpa", "flash_attention_2", "eager"),
        help="Attention implementation: sdpa, flash_attention_2, eager.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Instead of --device, let accelerate spread the model over all devices: auto, "
        "balanced, balanced_low_0, sequential."
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Load the weights in few bits: bnb-8bit, bnb-4bit, torchao-int8, quanto-int8 "
        "(pip install 'pore-vlm[interop]')."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Method = Annotated[
    str,
    typer.Option(
        autocompletion=completing.methods, help="Pruning method; `pore methods` lists them."
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(help="Visual tokens kept per image: 128, 0.25 or 25%. [default: 25%]"),
]
Keeps = Annotated[
    list[str], typer.Option("--keep", help="Visual tokens kept: 128, 0.25 or 25%. Repeatable.")
]
Average = Annotated[
    bool,
    typer.Option(
        "--average",
        help="Read --keep as the mean over the decoder layers, not as the number left at the end.",
    ),
]
Layer = Annotated[int | None, typer.Option(help="K, the first pruned layer, counted from 0.")]
GivenLayer = Annotated[int, typer.Option(help="K, the first pruned layer, counted from 0.")]
Reweight = Annotated[
    str | None,
    typer.Option(
        help="Position bias P to divide attention by: a file of `pore calibrate`, a hub id, "
        "'rope' for the data-free prior, or 'published:HOST/BENCHMARK'. Other corrections without "
        "calibration: 'without-rope', 'null-token' and 'null-token-ratio'."
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="Use P although it was measured with another model, revision, weights, config, layer, "
        "normalize, processor or template: name which of these may differ. Repeatable.",
    ),
]
Normalize = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing.one_of("prompt", "visual"),
        help="Softmax over the whole 'prompt', or over the 'visual' tokens alone.",
    ),
]
Guide = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing.models,
        help="For SGL, the method that another model guides: a smaller model, which must cut "
        "images into the same tokens. [default: the model itself]",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the method, as NAME=VALUE. Repeatable."),
]
SCENES = "[default: embedded:{0}; embedded:{0}:mixed for a model of images of any size]"
Samples = Annotated[
    str | None,
    typer.Option(
        "--samples",
        "-s",
        autocompletion=completing.samples,
        help="embedded:calibration, embedded:test, embedded:fresh, a JSONL file, a folder of "
        "images, a parquet or WebDataset (.tar) file or a folder of these, a folder of "
        "save_to_disk, or the hub id of a data set "
        "(ID:CONFIGURATION where it has several). [default: the embedded scenes of the split that "
        "the command is for; in mixed sizes (embedded:test:mixed) for a model of images of any "
        "size, videos (embedded:test:video) for embedded-video]",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Columns of a data set, or keys of a JSONL file, that go by other names: "
        "image=NAME,question=NAME,answer=NAME, or some of these."
    ),
]
Questions = Annotated[
    Path | None, typer.Option(help="For a folder of images: text file, one question a line.")
]
Split = Annotated[str, typer.Option(help="Split of a data set.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Largest number of samples.")]
MaxBad = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Skip samples that cannot be read, up to this share of all; more of them stop the "
        "run. A single one is always skipped, unless this is 0.",
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        help="How answers are scored: exact (one of the accepted answers), vqa (VQA accuracy "
        "against those of ten people), relaxed (numbers within 5 %, as ChartQA), anls (edit "
        "distance, as DocVQA), choice (the letter of an option)."
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples in one batch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, kw_only=True)
class Making:
    """Options of every command that makes a model; they come last in its help."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    attn: Attn = None
    revision: Revision = None

    @property
    def how(self) -> dict[str, Any]:
        """These options as the keywords of `load_twin`, and for `Loading` of `load_model`."""
        kind = Loading if isinstance(self, Loading) else Making
        return {each.name: getattr(self, each.name) for each in fields(kind)}


@dataclass(frozen=True, kw_only=True)
class Loading(Making):
    """Options of every command that loads the weights of a model."""

    device_map: DeviceMap = None
    quantize: Quantize = None


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Options of every command that prunes a model with one method; they come first in its help."""

    model: Model = "embedded"
    method: Method = "FastV"
    keep: Keep = None
    average: Average = False
    layer: Layer = None
    reweight: Reweight = None
    allow: Allow = None
    normalize: Normalize = None
    settings: Set = None


def takes(
    options: type[_Options],
    *,
    check: Callable[[_Options], object] | None = None,
    config: bool = False,
) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Turn a function of one dataclass into a command with one parameter for each field.

    Args:
        options: The dataclass. Its fields are annotated as typer's parameters are, and come in
            their order, those of `Loading` last.
        check: Refuses options that can be seen to be wrong before anything is loaded.
        config: Whether the options may come from a file.

    Returns:
        A decorator.
    """
    hints = get_type_hints(options, include_extras=True)
    last = {each.name for each in fields(Loading)}
    ordered: list[Any] = sorted(fields(options), key=lambda each: each.name in last)  # type: ignore[arg-type]
    kind = Parameter.KEYWORD_ONLY
    parameters = [
        Parameter(each.name, kind, default=_default(each), annotation=hints[each.name])
        for each in ordered
    ]
    own, defaults = [each.name for each in parameters], {e.name: e.default for e in parameters}
    parameters += [*placed(hints), *everywhere(config)]

    def decorate(run: Callable[[_Options], None]) -> Callable[..., None]:
        @wraps(run)
        def command(**given: Any) -> None:
            choose(given["debug"], given["verbose"], given["quiet"])
            named = names_of(given["context"].command.params)
            on_line = {name: one for name, one in named.items() if one.opts[0].startswith("-")}
            CHOSEN.options = {one.name: f"--{name}" for name, one in on_line.items()}
            chosen = {name: given[name] for name in own}
            if "model" in chosen:
                chosen["model"] = model_of(given)
            CHOSEN.given = given_of(given["context"], chosen, defaults)
            made = options(**chosen)
            if check is not None:
                check(made)
            if (path := given.get("save_config")) is not None:
                save(path, given["context"].command.name, named, chosen)
            run(made)

        # What typer reads, in place of the one argument of `run`.
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def everywhere(config: bool) -> list[Parameter]:
    """The parameters that every command has besides its own; with `config`, those of files too."""
    found: dict[str, tuple[Any, Any]] = {}
    if config:
        found = {"config": (Config, None), "save_config": (SaveConfig, None)}
    found |= {"debug": (Debug, False), "verbose": (Verbose, False), "quiet": (Quiet, False)}
    made = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in found.items()
    ]
    return [*made, Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]


def _default(each: Any) -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return Parameter.empty if each.default is MISSING else each.default


# -- reading values -------------------------------------------------------------------------------


def budget(text: str) -> int | float:
    """`128`, `0.25` or `25%` as a method's `keep`."""
    from pore.methods.settings import read_budget

    try:
        found = read_budget(text)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--keep") from None
    if not (found >= 1 if isinstance(found, int) else 0 < found <= 1):
        raise InputError(
            f"--keep {text} keeps no visual token or more than all; give a number of them, such as "
            "128, or a share of them, such as 0.25 or 25%."
        )
    return found


def size_of_image(text: str) -> tuple[int, int]:
    """`640x480` as width and height in pixels."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdigit() and 0 < int(part) < 1 << 16 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not a width and a height in pixels, such as 640x480."
        )
    return int(parts[0]), int(parts[1])


def budgets(
    keep: Iterable[str] | None, settings: Iterable[str] | None, default: str = "25%"
) -> list[int | float]:
    """The budgets given by --keep; --set must not give `keep` as well."""
    if keep and any(setting.startswith("keep=") for setting in settings or ()):
        raise InputError("--keep and --set keep=... name the same setting; give one of them.")
    return list(map(budget, keep or [default]))


def columns(text: str | None) -> dict[str, Any]:
    """`image=photo,question=ask` as the keywords of `load_samples`."""
    found: dict[str, Any] = {}
    for part in () if text is None else text.split(","):
        key, equals, name = (each.strip() for each in part.partition("="))
        if key not in ("image", "question", "answer") or not (equals and name) or key in found:
            raise InputError(
                f"--columns takes image=NAME, question=NAME and answer=NAME, each once and with "
                f"commas between them; {part!r} is none of these."
            )
        found[key] = name
    return found


def metric_of(options: Any) -> ScoringRule:
    """The rule by which --metric has answers scored."""
    from pore.evaluation.metrics import metric_named

    try:
        return metric_named(options.metric)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--metric") from None


def form_of_bias(text: str) -> FitKind:
    """Refuse a form of P that cannot be fitted, before anything is measured."""
    from pore.bias.curve import Kind

    forms = ["auto", *(form for form in get_args(Kind) if form not in ("rope", "power"))]
    if text not in forms:
        raise InputError(
            f"--kind: P cannot be fitted in the form {text!r}; choose from {', '.join(forms)}."
        )
    return text  # type: ignore[return-value]


def method_of(options: Any, model: Any, keep: int | float, **more: Any) -> Pruner:
    """The method that a command's options name, at a budget.

    Args:
        options: They have `method`, `settings` and `layer`, and may have `average` and `normalize`.
        model: The model.
        keep: The budget.
        **more: Further arguments of `pore.methods.making.make`.

    Returns:
        The method, without P.

    Raises:
        PoreError: The settings do not fit the method, or the method not the model.
    """
    from pore.methods.making import make

    some_have = ("average", "normalize")
    also = {name: getattr(options, name) for name in some_have if hasattr(options, name)}
    return make(
        options.method,
        model,
        keep,
        texts=options.settings or (),
        layer=options.layer,
        **also,
        **more,
    )
