"""What transformers, torch and accelerate do not promise, but `pore._private` relies on."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
    modeling_utils,
)

import pore
from cases import family_cases
from helpers.models import batch, prompt, tiny_llava
from pore import _compat as _private
from pore.errors import UnsupportedModelError
from pore.families.registry import family_of

SOURCE = Path(pore.__file__).parent
# Modules of transformers that its documentation is of, beside the top one.
DOCUMENTED = {"transformers.modeling_outputs", "transformers.utils.logging"}


def test_compiled_models_hold_the_original() -> None:
    """`torch.compile(model)._orig_mod`."""
    model = nn.Linear(2, 2)
    assert _private.unwrapped(torch.compile(model)) is model  # type: ignore[arg-type]
    assert _private.unwrapped(model) is model


def test_wrapped_by_peft() -> None:
    """`get_base_model`, which is public, and below it the model itself."""
    peft = pytest.importorskip("peft")
    model = tiny_llava()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert _private.unwrapped(wrapped) is model


def test_offloaded_modules_know_where_they_compute() -> None:
    """`module._hf_hook.execution_device` of accelerate."""
    module = nn.Linear(2, 2)
    accelerate.cpu_offload(nn.Sequential(module), execution_device=torch.device("cpu"))
    assert module.weight.device.type == "meta"
    assert _private.execution_device(module) == torch.device("cpu")


def test_commit_of_a_checkpoint() -> None:
    """`config._commit_hash`, which configs of transformers 5.16 take from the hub.

    From 5.18 on nothing tells the commit, so that it is unknown.
    """
    config = LlavaConfig(_commit_hash="abc")
    told = Version(transformers.__version__) < Version("5.18")
    assert _private.commit(config) == ("abc" if told else None)
    assert _private.commit(LlavaConfig()) is None


def test_models_are_built_without_initialising(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PreTrainedModel._from_config`, `transformers.initialization.no_init_weights`."""
    config = tiny_llava().config
    calls = []
    monkeypatch.setattr(nn.init, "normal_", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda *args, **_: calls.append(args))
    made = _private.random_model(LlavaForConditionalGeneration, config, torch.bfloat16, "eager")
    assert not calls
    assert made.dtype == torch.bfloat16
    assert _private.attention_name(made.model.language_model.config) == "eager"


# -- attention ------------------------------------------------------------------------------------


def test_models_are_built_from_a_config_in_parts() -> None:
    """`_from_config` takes a kernel for every part, and what multiplies experts."""
    config = tiny_llava().config
    kernels = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    made = _private.from_config(
        LlavaForConditionalGeneration, config, torch.bfloat16, kernels, "eager"
    )
    assert made.dtype == torch.bfloat16
    assert _private.attention_name(made.config.text_config) == "eager"
    assert _private.attention_name(made.config.vision_config) == "sdpa"
    assert _private.experts_name(made.config) == "eager"


def test_chance_is_put_back() -> None:
    """`torch.default_generator` is what `torch.randn` draws from on a CPU."""
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with _private.seeded():
            drawn.append(torch.randn(3).tolist())
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_kernels_and_makers_of_masks_have_names() -> None:
    """`ALL_ATTENTION_FUNCTIONS` and `ALL_MASK_ATTENTION_FUNCTIONS` list them."""
    before = _private.kernel_names()
    assert before.count("sdpa") == 2
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register("pore_test", lambda *_: None)
    assert sorted([*before, "pore_test"]) == sorted(_private.kernel_names())
    _private.forget_attention("pore_test")
    assert _private.kernel_names() == before


def test_versions_are_compared_as_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_private, "TESTED", ("5.9.0", "5.10.0"))
    for version, beyond in (("5.9.5", False), ("5.10.0", False), ("5.10.1", True), ("5.11", True)):
        monkeypatch.setattr("transformers.__version__", version)
        assert _private.beyond_tested() is beyond


def test_attention_of_a_config() -> None:
    """`config._attn_implementation`, read from `_attn_implementation_internal`."""
    model = tiny_llava(attention="sdpa")
    config = model.model.language_model.config
    assert _private.attention_name(config) == "sdpa"
    assert not _private.uses_flash(config)
    own = _private.with_attention(config, "flash_of_ours")
    assert type(own) is type(config)
    assert _private.attention_name(own) == "flash_of_ours"
    assert _private.uses_flash(own)
    assert _private.attention_name(config) == "sdpa"
    assert _private.attention_name(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_modules_call_the_kernel_that_their_config_names(attention: str) -> None:
    """`ALL_ATTENTION_FUNCTIONS`, its `_global_mapping`, and `eager_attention_forward`."""
    model, inputs = tiny_llava(attention=attention), batch([prompt(3, 1, 5)])
    family = family_of(model)
    module: Any = family.attention(family.layers(model)[1])
    kernel = _private.attention_kernel(module, attention)
    assert kernel is not None
    seen = []

    def ours(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((module, query.shape, key.shape, sorted(kwargs)))
        return kernel(module, query, key, value, mask, **kwargs)

    config, before = module.config, dict(modeling_utils.ALL_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        expected = model(**inputs).logits
        forget = _private.register_attention("pore_test", ours)
        module.config = _private.with_attention(config, "pore_test")
        try:
            logits = model(**inputs).logits
        finally:
            module.config = config
            forget()
    length = inputs["input_ids"].shape[1]
    [(which, query, key, names)] = seen
    assert which is module
    assert query == (1, 4, length, 8)
    assert key == (1, 2, length, 8)  # before they are repeated for the heads of a group
    assert "scaling" in names
    assert torch.equal(logits, expected)
    assert dict(modeling_utils.ALL_ATTENTION_FUNCTIONS) == before


def test_a_name_of_ours_goes_with_its_kernel() -> None:
    """`register_attention` holds no kernel alive, as transformers' own registry does."""
    known = modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(known)

    def ours(*_: Any) -> str:
        return "ours"

    forget = _private.register_attention("pore_test", ours)
    assert known["pore_test"]() == "ours"
    del ours
    assert dict(known) == before
    forget()  # once more
    assert dict(known) == before


@pytest.mark.parametrize("hooks", _private.HOOKS)
def test_where_torch_keeps_hooks(hooks: str) -> None:
    """`_forward_hooks` and `_forward_pre_hooks`, and of each the flags by the same number."""
    flags = {"_forward_pre_hooks": {"with_kwargs": True}}
    how = flags.get(hooks, {"with_kwargs": True, "always_call": True})
    name = {"_forward_pre_hooks": "register_forward_pre_hook"}.get(hooks, "register_forward_hook")
    module, fresh = nn.Linear(1, 1), vars(nn.Linear(1, 1))
    handle = getattr(module, name)(print, **how)
    held = {key for key, value in vars(module).items() if "hooks" in key and value != fresh[key]}
    assert held == {hooks, *_private.HOOKS[hooks]}
    assert list(vars(module)[hooks].items()) == [(handle.id, print)]
    assert all(list(vars(module)[flag]) == [handle.id] for flag in _private.HOOKS[hooks])


def test_copies_and_pickles_ask_the_object_for_its_state() -> None:
    """`__getstate__`, in the object itself before its class."""
    module: Any = nn.Linear(1, 1)
    vars(module)[_private.STATE] = partial(_told, module)
    for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.told == 1
        assert _private.STATE not in vars(twin)


def _told(module: Any) -> dict[str, Any]:
    state = {**type(module).__getstate__(module), "told": 1}
    del state[_private.STATE]
    return state


def test_a_call_of_a_module() -> None:
    """`_call_impl`, which one module may have of its own."""
    module: Any = nn.Linear(1, 1)
    vars(module)[_private.CALL] = lambda *args, **kwargs: (args, kwargs)
    assert module(1, a=2) == ((1,), {"a": 2})


def test_whereabouts_of_threads() -> None:
    """`sys._current_frames`: one that waits stays, one that has ended is nowhere."""
    inside, go = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        go.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(60)
    assert thread.ident is not None
    seen = []
    while len(seen) < 2 or seen[-1] != seen[-2]:
        seen.append(_private.whereabouts([thread.ident]))
    assert len(seen[-1]) == 1
    go.set()
    thread.join()
    assert _private.whereabouts([thread.ident]) == []


def test_a_module_without_eager_attention_has_no_kernel() -> None:
    assert _private.attention_kernel(nn.Linear(1, 1), "eager") is None


def test_layers_have_the_number_of_their_place_in_the_cache() -> None:
    """`attention.layer_idx`."""
    model = tiny_llava()
    family = family_of(model)
    numbers = [_private.layer_number(family.attention(layer)) for layer in family.layers(model)]
    assert numbers == list(range(len(numbers)))


# -- masks and caches -----------------------------------------------------------------------------


def test_masks_are_causal_and_hide_padding() -> None:
    """`ALL_MASK_ATTENTION_FUNCTIONS` and `causal_mask_function` of `masking_utils`."""
    config = tiny_llava(attention="sdpa").model.language_model.config
    hidden = torch.zeros(1, 3, 8)
    valid = torch.tensor([[False, True, True, True, True]])
    mask = _private.causal_mask(hidden, valid, config=config, length=3, offset=2)
    causal = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask, causal[None, None])

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < 2)

    mask = _private.causal_mask(hidden, valid, config=config, length=3, offset=2, see=near)
    band = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask, band[None, None])
    flash = _private.with_attention(config, "flash_attention_2")
    mask = _private.causal_mask(hidden, valid, config=flash, length=3, offset=2)
    assert torch.equal(mask.bool(), valid)


def test_what_a_cache_holds() -> None:
    """`cache.get_mask_sizes`, `cache.is_sliding` and `cache.layers[i].keys`."""
    config = tiny_llava(layers=2).model.language_model.config
    keys, values = torch.randn(2, 1, 2, 5, 8).unbind(0)
    cache = DynamicCache(config=config)
    assert _private.cached_keys(None, 0) is None
    assert _private.cached_keys(cache, 0) is None
    assert _private.slots_of(cache, 5, 0) == 5
    cache.update(keys, values, 0)
    assert torch.equal(_private.cached_keys(cache, 0), keys)
    assert _private.slots_of(cache, 1, 0) == 6
    assert _private.sliding_layers(cache) == [False, False]
    static = StaticCache(config=config, max_cache_len=9)
    static.update(keys, values, 0)
    assert _private.slots_of(static, 1, 0) == 9
    assert torch.equal(_private.cached_keys(static, 0)[:, :, :5], keys)
    sliding = SimpleNamespace(is_sliding=[True, False])
    assert _private.sliding_layers(sliding) == [True, False]
    assert _private.sliding_layers(None) == []


def test_caches_know_which_layers_slide() -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=4,
    )
    cache = DynamicCache(config=config)
    assert _private.sliding_layers(cache) == [True, False, True]
    keys = torch.randn(1, 1, 6, 8)
    for layer in range(3):
        cache.update(keys, keys, layer)
    assert [_private.slots_of(cache, 1, layer) for layer in range(3)] == [4, 7, 4]


def test_tokens_of_a_block_see_each_other() -> None:
    """`masking_utils.create_masks_for_generate(block_sequence_ids=)`."""
    config = LlamaConfig(attn_implementation="sdpa")
    tokens, blocks = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[-1, 0, 0, -1]])
    mask = _private.block_masks(config, torch.zeros(1, 4, 8), tokens, None, blocks)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    causal[1, 2] = True
    assert torch.equal(mask[0, 0], causal)


# -- families -------------------------------------------------------------------------------------


def test_deepstack_adds_features_to_visual_tokens() -> None:
    """`_deepstack_process` of the decoders of Qwen3-VL, called by their `forward`."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

    for kind in (Qwen3VLTextModel, Qwen3VLMoeTextModel):
        process = getattr(kind, _private.DEEPSTACK)
        assert f"self.{_private.DEEPSTACK}(" in inspect.getsource(kind.forward)
        assert list(inspect.signature(process).parameters)[1:] == [
            "hidden_states",
            "visual_pos_masks",
            "visual_embeds",
        ]
        visual = torch.tensor([[False, True, True]])
        added = process(None, torch.zeros(1, 3, 2), visual, torch.tensor([[1.0, 2], [3, 4]]))
        assert added.tolist() == [[[0, 0], [1, 2], [3, 4]]]


def test_gemma4_spares_rows_of_the_layers_that_share_keys() -> None:
    """`_maybe_slice_kv_shared_inputs`, and `shared_kv_states` by kind of layer."""
    from transformers.models.gemma4 import modeling_gemma4 as gemma4

    decoder, layer = gemma4.Gemma4TextModel, gemma4.Gemma4TextDecoderLayer
    assert _private.SHARED_KEYS in inspect.signature(layer.forward).parameters
    attend = inspect.getsource(gemma4.Gemma4TextAttention.forward)
    assert f"{_private.SHARED_KEYS}[self.layer_type]" in attend
    if Version(transformers.__version__) < Version("5.23") and not hasattr(
        decoder, _private.SPARED_ROWS
    ):
        pytest.skip("an older transformers spares none")
    process = getattr(decoder, _private.SPARED_ROWS)
    assert f"self.{_private.SPARED_ROWS}(" in inspect.getsource(decoder.forward)
    config = transformers.Gemma4TextConfig(attn_implementation="eager")
    states, tables = torch.randn(1, 3, 4), {"full_attention": (torch.randn(1, 3, 4),) * 2}
    inputs, masks = torch.randn(1, 3, 2, 4), {"full_attention": torch.zeros(1, 1, 3, 3)}
    for wanted, left in ((1, 1), (0, 3)):
        hidden, *_ = process(
            SimpleNamespace(config=config),
            states,
            inputs,
            tables,
            masks,
            wanted,
            **_private.cache_argument(process, None),
        )
        assert torch.equal(hidden, states[:, -left:])


def test_generate_runs_the_prompt_by_one_method() -> None:
    """`_prefill`, whose chunks are as long as its `generation_config.prefill_chunk_size`."""
    model, ids = tiny_llava(), torch.tensor([[5, 6, 7, 8, 9]])
    prefill, lengths, configs = getattr(model, _private.PREFILL), [], []

    def ours(input_ids: torch.Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        assert torch.equal(input_ids, ids)
        configs.append(generation_config.prefill_chunk_size)
        return prefill(input_ids, generation_config, *args, **kwargs)

    setattr(model, _private.PREFILL, ours)
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(input_ids=ids, max_new_tokens=2, prefill_chunk_size=2)
    model.generate(input_ids=ids, max_new_tokens=2)
    assert configs == [2, None]
    assert lengths == [2, 2, 1, 1, 5, 1]


def test_tiles_of_an_image() -> None:
    """`get_anyres_image_grid_shape`: rows and columns of the best of the sizes that are allowed."""
    assert _private.tiles_of((300, 700), [[336, 672], [672, 336]], 336) == (1, 2)
    assert _private.tiles_of(torch.tensor([700, 300]), [[336, 672], [672, 336]], 336) == (2, 1)


def test_windows_of_a_tower() -> None:
    """`get_vision_window_index`: which token comes where, windows one behind the other."""
    config = SimpleNamespace(spatial_merge_size=2, window_size=16, patch_size=4)
    order = _private.window_order(config, torch.tensor([[1, 4, 6], [1, 2, 6]]))
    windows = [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
    assert order.tolist() == [token for window in windows for token in window]


# -- nothing else ---------------------------------------------------------------------------------


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """The underscored names that the package itself defines."""
    found = {"_replace", "_asdict"}  # of named tuples, and documented
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                found |= {node.attr} if of_self else set()
    return found


def foreign(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of others that a file reads, or undocumented modules that it imports from."""
    parts = {id(p) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for p in n.values}
    for node in ast.walk(tree):
        names = []
        if id(node) in parts:
            continue
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            modules = [alias.name for alias in node.names] if module is None else [module]
            for name in modules:
                if name.startswith("transformers.") and name not in DOCUMENTED:
                    yield f"line {node.lineno}: {name}"
            if module is not None and not module.startswith("pore"):
                names = [*module.split("."), *(alias.name for alias in node.names)]
        for name in names:
            if re.fullmatch(r"_[a-z]\w*", name) and name not in own:
                yield f"line {node.lineno}: {name}"


def test_no_other_file_touches_what_is_private() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    private = trees.pop(SOURCE / "_compat.py")
    own = own_names(trees)
    found = {
        str(path.relative_to(SOURCE)): list(foreign(tree, own)) for path, tree in trees.items()
    }
    assert {path: lines for path, lines in found.items() if lines} == {}
    named = {line.split(": ")[1] for line in foreign(private, own)}
    assert {"_attn_implementation", "_orig_mod", "_hf_hook", "_deepstack_process"} <= named


EVERYONE = [*family_cases.CASES, *family_cases.COUSINS]


@pytest.mark.parametrize("case", EVERYONE, ids=lambda case: case.name)
def test_every_argument_of_decoders_and_layers_is_known(case: family_cases.Case) -> None:
    """One that is new, or has a new name, is to be looked at: is there one for every token?"""
    model = case.model()
    family = family_of(model)

    def arguments(module: nn.Module) -> set[str]:
        return set(inspect.signature(type(module).forward).parameters) - {"self", "kwargs"}

    assert arguments(family.decoder(model)) <= _private.DECODER
    for layer in family.layers(model):
        assert arguments(layer) <= _private.LAYER
        assert set(family.token_inputs) <= arguments(layer) | arguments(family.decoder(model))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "attention_mask", "position_ids"])
@pytest.mark.parametrize("which", ["decoder", "layer"])
def test_a_renamed_argument_is_refused(
    which: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava()
    decoder = model.model.language_model
    module = decoder if which == "decoder" else decoder.layers[0]
    signature = inspect.signature(type(module).forward)
    if name not in signature.parameters:
        pytest.skip("another version of transformers calls it so")
    other = [
        one.replace(name="renamed" if one.name == name else one.name)
        for one in signature.parameters.values()
        if not (one.name == "position_embeddings" and name == "position_ids")
    ]
    forward = type(module).forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    changed.__signature__ = signature.replace(parameters=other)  # type: ignore[attr-defined]
    kind = type(module.__class__.__name__, (type(module),), {"forward": changed})
    monkeypatch.setattr(module, "__class__", kind)
    refused = pytest.raises(UnsupportedModelError, match="a name that this version of pore knows")
    with refused, pore.FastV(keep=4)(model):
        pass


def test_the_cache_is_found_by_what_it_is() -> None:
    cache = transformers.DynamicCache()
    for name in ("cache", "past_key_values", "anything"):
        assert _private.cache_in({"use_cache": True, name: cache}) is cache
        assert _private.without_cache({"x": 1, name: cache}) == {"x": 1, name: None}
    assert _private.cache_in((torch.ones(1), cache)) is cache
    assert _private.cache_in({"x": 1}) is None
    assert _private.cache_in(None) is None

    def takes(cache: Any) -> None: ...

    def took(past_key_values: Any) -> None: ...

    def unknown(memory: Any) -> None: ...

    assert _private.cache_argument(takes, cache) == {"cache": cache}
    assert _private.cache_argument(took, cache) == {"past_key_values": cache}
    with pytest.raises(UnsupportedModelError, match="takes no cache by a name"):
        _private.cache_argument(unknown, cache)
