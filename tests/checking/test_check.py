"""The library's check of itself: twins of full-size configs, and what is caught."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import pore
from cases import CASES, COUSINS, PUBLISHED
from cases.base import Case
from helpers.engine import _flash, fingerprint
from helpers.full_configs import stand_in
from helpers.models import tiny_llava
from helpers.patches import patched, without_masks
from helpers.unknown import my_vlm
from pore._compat.versions import beyond_tested
from pore.checking import proofs as checking
from pore.checking.twin import twin_of
from pore.cli.app import app
from pore.errors import UnsupportedModelError
from pore.families.registry import family_of


def case(name: str) -> Case:
    return next(one for one in [*CASES, *COUSINS] if one.name == name)


@pytest.fixture
def beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that is newer than those tested, of which nothing was found yet."""
    monkeypatch.setattr("pore._compat.versions.TESTED", ("5.0.0", "5.15.0"))
    monkeypatch.setattr(checking, "_proofs", checking._Proofs())


# -- what holds -----------------------------------------------------------------------------------


# Between them they have all that makes families special in a decoder: positions on several axes,
# features for lower layers, a recurrence, chunks, windows, masks by types, keys that are shared.
OFTEN = (
    "LLaVA-1.5",
    "LLaVA-NeXT",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "Qwen3.5",
    "Llama 4",
    "Gemma 3",
    "Gemma 4",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in PUBLISHED],
)
@pytest.mark.at_once(1)
@pytest.mark.in_ci(8)
def test_all_holds_in_every_family(name: str) -> None:
    if name == "Llama 4":
        case(name).model()  # whatever it needs to run unpruned
    found = pore.check(stand_in(PUBLISHED[name]()))
    assert found.passed, str(found)
    assert found.parameters < 1_000_000
    told = {row.name.split(":")[0] for row in found.rows}
    family = twin_of(PUBLISHED[name]())[1]
    towers = family.tower_refusal is None and "several" not in name
    assert {"FastV (decoder)", "DivPrune (embeddings)"} <= told
    assert ("FasterVLM (tower)" in told) == towers
    assert any("equals masked dense" in row.name for row in found.rows)


@pytest.mark.parametrize("one", [*CASES, *COUSINS], ids=lambda one: one.name)
@pytest.mark.slow
@pytest.mark.in_ci(8)
def test_all_holds_of_tiny_models(one: Case) -> None:
    assert pore.check(one.model()).passed


TYPES = ("float32", "float16", "bfloat16")
MODELS = ("LLaVA-1.5", "Qwen2.5-VL", "Gemma 3", "Qwen3-VL-MoE")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [  # every one once, the other pairs less often
        pytest.param(name, dtype, marks=() if i % 3 == j else pytest.mark.slow)
        for i, name in enumerate(MODELS)
        for j, dtype in enumerate(TYPES)
    ],
)
@pytest.mark.slow
def test_the_type_of_the_model_is_checked_too(name: str, dtype: str) -> None:
    found = pore.check(stand_in(PUBLISHED[name](), getattr(torch, dtype)))
    assert found.passed, str(found)
    assert {row.dtype for row in found.rows} == {"float64", dtype}


def test_the_attention_and_cache_of_the_model() -> None:
    model = tiny_llava(attention="eager", dtype=torch.float32)
    model.generation_config.cache_implementation = "static"
    found = pore.check(model)
    assert (found.passed, found.attention, found.cache) == (True, "eager", "static")
    # Eager attention gives no numbers for padding in float64.
    assert {row.dtype for row in found.rows} == {"float32"}


def test_flash_attention_s_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in, whose name transformers would look up on the hub."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_test", _flash)
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(masks, "flash_test", flash_attention_mask)
    model = stand_in(PUBLISHED["LLaVA-1.5"]())
    model.config.text_config._attn_implementation_internal = "flash_test"
    subject = checking.Subject(model, family_of(model), None)
    with torch.no_grad():
        subject.warm()
        rows = list(checking._rows(subject, exact=True))
    assert [(row.name, row.finding) for row in rows if not row.holds] == []
    assert any("batch equals singles" in row.name for row in rows)


def test_in_the_midst_of_other_modes() -> None:
    model = tiny_llava(dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = pore.check(model)
    assert found.passed, str(found)


def test_the_model_is_left_alone() -> None:
    model = tiny_llava()
    weights = [weight.clone() for weight in model.parameters()]
    before, state = fingerprint(model), torch.get_rng_state()
    pore.check(model)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_result_can_be_printed_and_written() -> None:
    found = pore.check(tiny_llava())
    told = json.loads(json.dumps(found.to_dict()))
    assert told["passed"] is True
    assert told["versions"]["transformers"] == transformers.__version__
    assert told["tested"] is True
    assert [row["holds"] for row in told["rows"]] == [True] * len(found.rows)
    assert all(row.name in str(found) for row in found.rows)
    assert "all holds" in found.summary


# -- before a block -------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that a block asked about."""
    seen: list[Any] = []
    look = checking._check

    def counted(model: Any, thorough: bool) -> Any:
        seen.append(model)
        return look(model, thorough)

    monkeypatch.setattr(checking, "_check", counted)
    return seen


def enter(model: Any) -> None:
    with pore.FastV(6)(model):
        pass


@pytest.mark.usefixtures("beyond")
class TestBeyondTheTested:
    def test_a_kind_is_looked_at_once(self, looks: list[Any]) -> None:
        model = tiny_llava()
        for one in (model, model, tiny_llava(seed=1)):
            enter(one)
        assert looks == [model]
        enter(tiny_llava(kv_heads=4))
        enter(tiny_llava(attention="eager"))
        assert len(looks) == 3

    def test_threads_wait_for_one_look(self, looks: list[Any]) -> None:
        models = [tiny_llava() for _ in range(4)]
        failed: list[BaseException] = []

        def run(model: Any) -> None:
            try:
                enter(model)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (failed, len(looks)) == ([], 1)

    def test_what_fails_goes_on_failing(self, looks: list[Any]) -> None:
        model = tiny_llava()
        before = fingerprint(model)
        with patched(without_masks, model):
            for _ in range(2):
                with pytest.raises(UnsupportedModelError, match=r"newer than 5\.15\.0"):
                    enter(model)
        assert looks == [model]
        assert fingerprint(model) == before

    @pytest.mark.slow
    def test_applied_and_wrapped_models(self, looks: list[Any]) -> None:
        model = tiny_llava()
        pore.FastV(6).apply(torch.compile(model))
        pore.remove(model)
        assert looks == [model]

    def test_a_model_without_its_head(self, looks: list[Any]) -> None:
        base = tiny_llava().model
        enter(base)
        assert looks == [base]

    def test_a_result_says_so(self) -> None:
        found = pore.check(tiny_llava())
        assert found.passed
        assert not found.tested
        assert "newer than 5.15.0" in found.summary

    def test_settings_that_do_not_fit_are_said_first(self, looks: list[Any]) -> None:
        with pytest.raises(pore.PoreError, match="cannot be the first pruned layer"):
            pore.FastV(6, layer=99)(tiny_llava()).__enter__()
        assert looks == []

    def test_a_family_without_an_example_is_refused_in_words(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pore.Family, "registry", dict(pore.Family.registry))
        type("MyVLM", (pore.Family,), {"name": "My VLM", "model_types": ("my_vlm",)})
        model = my_vlm(transformers.LlamaConfig(**LLAMA))
        for refused in (enter, pore.check):
            with pytest.raises(UnsupportedModelError, match=r"My VLM does not say .* `example`"):
                refused(model)

    def test_a_config_that_cannot_be_shrunk_is_refused_in_words(self) -> None:
        model = tiny_llava()
        model.config.image_grid_pinpoints = "as many as fit"
        with pytest.raises(UnsupportedModelError, match=r"No tiny twin .* `shrink`"):
            enter(model)


LLAMA = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}


def test_on_a_tested_version_nothing_is_asked(looks: list[Any]) -> None:
    assert not beyond_tested()
    enter(tiny_llava())
    assert looks == []


def test_a_described_family_with_an_example_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pore.Family, "registry", dict(pore.Family.registry))

    class MyVLM(pore.Family):
        name = "My VLM"
        model_types = ("my_vlm",)

        def example(self, model: Any, noise: Any) -> Any:
            return [model.config.image_token_id] * 16, {"pixel_values": noise(1, 3, 16, 16)}

    found = pore.check(my_vlm(transformers.LlamaConfig(**LLAMA)))
    assert found.passed, str(found)
    assert not any("tower" in row.name for row in found.rows)


# -- the command ----------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments])


def test_the_command_checks_the_embedded_model() -> None:
    found = call()
    assert found.exit_code == 0
    assert "LlavaForConditionalGeneration (LLaVA-1.5): all holds" in " ".join(found.stdout.split())


def test_the_command_needs_nothing_but_a_config(tmp_path: Path) -> None:
    PUBLISHED["Qwen2.5-VL"]().save_pretrained(tmp_path)
    found = call(str(tmp_path), "--json", "--attn", "eager", "--dtype", "bfloat16")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["family"] == "Qwen2-VL"
    assert told["attention"] == "eager"
    assert {row["dtype"] for row in told["rows"]} == {"float32", "bfloat16"}


def test_the_command_exits_with_1_where_something_fails() -> None:
    with patched(without_masks, None):
        found = call()
    assert found.exit_code == 1
    assert "FAILS" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float12"), "not a number format"),
        (("--attn", "nonsense"), "cannot make"),
        (("nowhere/at-all",), "huggingface.co"),
    ],
)
def test_errors_of_the_command(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it need not be asked
    found = call(*arguments)
    assert found.exit_code == 1
    assert message in " ".join(found.output.split())
