"""What is scored by has float32 at least and no graph, whatever surrounds the model.

Every method that is registered, with what it reads, prepares, chooses and merges looked at from
within: against the same computed anew in float64 from the very tensors that it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pore
from cases import CASES
from cases.base import Case
from helpers.families import refusal
from helpers.families import usual as in_family
from helpers.methods import EVERY, KEEP, LAYERS, usual
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage, View
from pore.methods import guiding
from pore.tensors.attention import cls_attention, received_attention
from pore.tower.stages import Block, TowerStage, TowerView

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "convolution", "_cdist_forward"}
SURROUNDINGS = ["bf16 autocast", "fp16 autocast", "bf16 weights"]
ON_EMBEDDINGS = [
    name
    for name in EVERY
    if all(
        isinstance(s, Stage) and s.layer == 0 and not s.tower for s in usual(name, KEEP).stages()
    )
]
FAMILIES = {"LLaVA-1.5 with SigLIP", "LLaVA-NeXT", "Qwen2.5-VL", "Llama 4"}


class Products(TorchDispatchMode):
    """The types that tensors are multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.types |= {x.dtype for x in args if isinstance(x, Tensor)}
        return out


class Graphs(TorchFunctionMode):
    """Whether any product becomes part of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "matmul" in getattr(func, "__name__", "") and isinstance(out, Tensor):
            self.found |= out.requires_grad
        return out


def doubled(thing: Any) -> Any:
    """A view, a block or anything else with its floating tensors in float64."""
    if isinstance(thing, Tensor):
        return thing.double() if thing.is_floating_point() else thing
    if isinstance(thing, tuple):
        return tuple(map(doubled, thing))
    if isinstance(thing, (View, Block, TowerView)) or (
        is_dataclass(thing) and not isinstance(thing, type)
    ):
        return replace(thing, **{f.name: doubled(getattr(thing, f.name)) for f in fields(thing)})
    return thing


def close(got: Any, expected: Any) -> None:
    """Assert that whatever a reader gives is what float64 gives, to float32's precision."""
    if is_dataclass(got):
        for f in fields(got):
            close(getattr(got, f.name), getattr(expected, f.name))
    elif isinstance(got, Tensor) and got.is_floating_point():
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    else:
        assert got is None or torch.equal(got, expected)


class Watched(Pruner):
    """A method of which everything that it computes is compared with float64."""

    def __init__(self, method: Pruner) -> None:
        self.method = method
        self.paper = method.paper
        self.seed = getattr(method, "seed", 0)
        self.looked: list[str] = []
        self._made: dict[Any, Callable[..., Any]] = {}
        self._exact: dict[int, Any] = {}

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.name

    def stages(self) -> list[Stage | TowerStage]:
        return [self._watched(i, stage) for i, stage in enumerate(self.method.stages())]

    def _watched(self, i: int, stage: Stage | TowerStage) -> Stage | TowerStage:
        if isinstance(stage, TowerStage):
            merge = None if stage.merge is None else self._once((i, "merge"), self._merge, stage)
            return replace(stage, rule=self._once((i, "rule"), self._tower, stage), merge=merge)
        prepare = stage.prepare
        if prepare is not None:
            prepare = self._once(prepare, self._prepare, prepare)
        reader = stage.attention
        if reader is not None:
            reader = self._once((i, "attention"), self._read, i, reader)
        rule = self._once((i, "rule"), self._rule, i, stage)
        return replace(stage, rule=rule, attention=reader, prepare=prepare)

    def _once(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        """Stages that share a function share what watches it."""
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    @contextmanager
    def _look(self, what: str, graph: bool = False) -> Iterator[None]:
        self.looked.append(what)
        assert torch.is_grad_enabled() == graph
        with Graphs() as graphs, Products() as products:
            yield
        assert products.types <= {torch.float32, torch.int64}, (what, products.types)
        # The only products that may be part of one are sums of features that are merged.
        assert graph or not graphs.found

    def _prepare(self, prepare: Any) -> Any:
        def watch(view: View) -> Any:
            with self._look("prepare"):
                return prepare(view)

        return watch

    def _read(self, i: int, reader: Any) -> Any:
        def watch(attention: Any) -> Any:
            plain = None
            if self.method.name in ("FEATHER", "PACT"):  # the model computes them, in its format
                plain = attention.plain()
                attention = replace(attention, plain=lambda: plain)
            with self._look("attention"):
                got = reader(attention)
            wide = {name: doubled(getattr(attention, name)) for name in ("query", "key", "value")}
            if plain is not None:
                wide["plain"] = lambda: doubled(plain)
            self._exact[i] = reader(replace(attention, **wide, read=[]))
            close(got, self._exact[i])
            return got

        if hasattr(reader, "measures"):
            watch.measures = reader.measures  # type: ignore[attr-defined]
        return watch

    def _rule(self, i: int, stage: Stage) -> Any:
        def watch(view: View) -> Any:
            graph = stage.merges and torch.is_grad_enabled()
            chance = view.generator.get_state()
            with self._look("rule", graph):
                got = stage.rule(view)
            view.generator.set_state(chance)
            states = doubled(view.hidden_states)
            exact = replace(
                view,
                hidden_states=states,
                attention=self._exact.get(i),
                memory=copy.copy(view.memory),  # which a stage may write to
            )
            assert torch.equal(got.keep, stage.rule(exact).keep)
            return got

        return watch

    def _tower(self, stage: TowerStage) -> Any:
        def watch(view: TowerView) -> Any:
            graph = torch.is_grad_enabled()
            with self._look("tower", graph), Graphs() as graphs:
                got = stage.rule(view)
            assert stage.merges or not graphs.found
            assert not view.cls_attention.requires_grad
            exact = doubled(view)
            weights = [self._weights(exact, i) for i in range(len(view.queries))]
            if weights:
                close(view.cls_attention, torch.stack(weights))
                exact = replace(exact, cls_attention=torch.stack(weights))
            expected = stage.rule(exact)
            assert torch.equal(got.raster, expected.raster)
            torch.testing.assert_close(
                got.features.double(), expected.features, rtol=1e-2, atol=1e-2
            )
            return got

        return watch

    @staticmethod
    def _weights(view: TowerView, i: int) -> Tensor:
        query, key = view.queries[i], view.keys[i]
        read = cls_attention if view.has_cls else received_attention
        weights = read(query, key, query.shape[-1] ** -0.5, view.real)[..., int(view.has_cls) :]
        return weights if view.pooling is None else view.pooling.means(weights, -1)

    def _merge(self, stage: TowerStage) -> Any:
        assert stage.merge is not None
        merge = stage.merge

        def watch(block: Block) -> Any:
            with self._look("merge", torch.is_grad_enabled()):
                got = merge(block)
            assert torch.equal(got.raster, merge(doubled(block)).raster)
            return got

        return watch


@contextmanager
def surrounded(how: str) -> Iterator[None]:
    kind = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}.get(how)
    with nullcontext() if kind is None else torch.autocast("cpu", dtype=kind):
        yield


@cache
def llava(how: str) -> Any:
    dtype = torch.bfloat16 if how == "bf16 weights" else torch.float32
    return tiny_llava(layers=LAYERS, tower_layers=4, dtype=dtype)


@pytest.mark.parametrize("how", SURROUNDINGS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.at_once(48)
def test_every_score_is_that_of_float32(name: str, how: str) -> None:
    model = llava(how)
    inputs = batch([prompt(3, 1, 5), prompt(7, 2, 4, 1)], dtype=model.dtype)
    watched = Watched(usual(name, KEEP))
    with torch.no_grad(), surrounded(how), watched(model) as run:
        out = model(**inputs)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert bool(torch.isfinite(out.logits).all())
    stages = watched.method.stages()
    expected = {"tower" if isinstance(s, TowerStage) else "rule" for s in stages}
    expected |= {"attention" for s in stages if isinstance(s, Stage) and s.attention}
    expected |= {"prepare" for s in stages if isinstance(s, Stage) and s.prepare}
    expected |= {"merge" for s in stages if isinstance(s, TowerStage) and s.merge}
    assert set(watched.looked) == expected
    assert all(len(i.kept) + i.extra == KEEP for s in run.report for i in s.images)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.at_once(32)
def test_scores_have_no_graph(name: str, mode: str) -> None:
    """While the model is trained under autocast, and in inference mode."""
    model = copy.deepcopy(llava("bf16 autocast"))
    inputs = batch([prompt(3, 1, 5), prompt(7, 2, 4, 1)], dtype=torch.float32)
    watched = Watched(usual(name, KEEP))
    around = torch.inference_mode() if mode == "inference" else nullcontext()
    with around, surrounded("bf16 autocast"), watched(model.train()):
        logits = model(**inputs, use_cache=False).logits
    if mode == "training":
        logits.float().square().mean().backward()
        layers = model.model.language_model.layers
        assert all(p.grad is not None for layer in layers for p in layer.parameters())
        assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


@cache
def in_float32(case: Case) -> Any:
    return copy.deepcopy(case.model()).float()


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        for name in EVERY
        if case.name in FAMILIES and refusal(case, name) is None
    ],
)
@pytest.mark.at_once(40)
def test_every_score_is_that_of_float32_in_other_towers(case: Case, name: str) -> None:
    """Towers without CLS, with CLS last, that merge patches, cut tiles, or take images packed."""
    model = in_float32(case)
    inputs = case.inputs([[5, -1, 7, 8], [5, 6, 10, -2, 7, 8, 9, 11]])
    inputs = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    watched = Watched(in_family(name, KEEP, case))
    with torch.no_grad(), surrounded("bf16 autocast"), watched(model):
        model(**inputs)
    assert watched.looked


@pytest.mark.parametrize("how", SURROUNDINGS)
@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_choice_on_given_embeddings_does_not_mind_autocast(name: str, how: str) -> None:
    """Methods that act on the embeddings keep under autocast what they keep without."""
    pruner, model = usual(name, KEEP), llava(how)
    embeds = torch.randn(2, N + 6, 32, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    visual = torch.zeros(2, N + 6, dtype=torch.bool)
    visual[:, 2:-4] = True
    kept = []
    for around in (nullcontext(), surrounded(how)):
        with torch.no_grad(), around, pruner(model) as run:
            run.mark_visual(visual)
            model(inputs_embeds=embeds)
        kept.append([sample.images[0].kept for sample in run.report])
    assert kept[0] == kept[1]


def test_a_scorer_of_ones_own_is_surrounded_likewise() -> None:
    model, weight = llava("bf16 autocast"), torch.randn(32, 1, requires_grad=True)

    def scorer(states: Tensor, layout: Any, attention: Tensor | None) -> Tensor:
        assert attention is not None
        scores = (layout.gather(states) @ weight)[..., 0] + attention
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        return scores

    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    with surrounded("bf16 autocast"), pore.Scored(KEEP, scorer, 2, "prompt")(model):
        model(**inputs)
        assert torch.is_autocast_enabled("cpu")  # the caller's own goes on
        assert torch.is_grad_enabled()


def test_a_guide_reads_in_float32() -> None:
    """The guiding model's attention under autocast is what its own queries and keys say."""
    model, seen = llava("bf16 autocast"), Products()
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    with surrounded("bf16 autocast"), pytest.MonkeyPatch.context() as patch:
        original = guiding.row_logits

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            with seen:
                return original(*args, **kwargs)

        patch.setattr(guiding, "row_logits", watched)
        guide = pore.guide(model, inputs, max_new_tokens=2)
    assert seen.types == {torch.float32}
    assert guide.importance.dtype == torch.float32
    assert int((inputs["input_ids"] == IMAGE).sum()) == guide.importance.shape[1]
