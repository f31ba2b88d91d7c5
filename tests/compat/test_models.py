"""The private functions of single model files."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from cases import CASES
from helpers.models import tiny_llava
from pore._compat.arguments import SHARED_KEYS
from pore._compat.caches import cache_argument
from pore._compat.models import (
    DEEPSTACK,
    ENCODE_IMAGES,
    ENCODE_VIDEOS,
    PREFILL,
    SPARED_ROWS,
    before_mlp,
    of_layers,
    tiles_of,
    window_order,
)
from pore.families.registry import family_of


def test_deepstack_adds_features_to_visual_tokens() -> None:
    """`_deepstack_process` of the decoders of Qwen3-VL, called by their `forward`."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

    for kind in (Qwen3VLTextModel, Qwen3VLMoeTextModel):
        process = getattr(kind, DEEPSTACK)
        assert f"self.{DEEPSTACK}(" in inspect.getsource(kind.forward)
        assert list(inspect.signature(process).parameters)[1:] == [
            "hidden_states",
            "visual_pos_masks",
            "visual_embeds",
        ]
        visual = torch.tensor([[False, True, True]])
        added = process(None, torch.zeros(1, 3, 2), visual, torch.tensor([[1.0, 2], [3, 4]]))
        assert added.tolist() == [[[0, 0], [1, 2], [3, 4]]]


def test_a_layer_goes_on_with_the_tensor_that_it_gives_to_the_norm_before_its_mlp() -> None:
    """`post_attention_layernorm`, or in Gemma `pre_feedforward_layernorm`.

    `tests/engine/test_before_mlp.py` shows the same in every family.
    """
    layer: Any = tiny_llava().model.language_model.layers[0]
    norm = before_mlp(layer)
    assert norm is layer.post_attention_layernorm

    def zeroed(_: Any, args: Any) -> None:
        args[0].zero_()

    norm.register_forward_pre_hook(zeroed)
    width = layer.self_attn.head_dim
    tables = torch.ones(1, 3, width).double(), torch.zeros(1, 3, width).double()
    states = torch.randn(1, 3, layer.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        out = layer(states, position_embeddings=tables, attention_mask=None)
        nothing = layer.mlp(layer.post_attention_layernorm(torch.zeros_like(states)))
    assert torch.equal(out[0] if isinstance(out, tuple) else out, nothing)
    gemma: Any = next(case for case in CASES if case.name == "Gemma 3").model()
    first = gemma.model.language_model.layers[0]
    assert before_mlp(first) is first.pre_feedforward_layernorm


def test_gemma4_spares_rows_of_the_layers_that_share_keys() -> None:
    """`_maybe_slice_kv_shared_inputs`, and `shared_kv_states` by kind of layer."""
    from transformers.models.gemma4 import modeling_gemma4 as gemma4

    decoder, layer = gemma4.Gemma4TextModel, gemma4.Gemma4TextDecoderLayer
    assert SHARED_KEYS in inspect.signature(layer.forward).parameters
    attend = inspect.getsource(gemma4.Gemma4TextAttention.forward)
    assert f"{SHARED_KEYS}[self.layer_type]" in attend
    if Version(transformers.__version__) < Version("5.23") and not hasattr(decoder, SPARED_ROWS):
        pytest.skip("an older transformers spares none")
    process = getattr(decoder, SPARED_ROWS)
    assert f"self.{SPARED_ROWS}(" in inspect.getsource(decoder.forward)
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
            **cache_argument(process, None),
        )
        assert torch.equal(hidden, states[:, -left:])


def test_generate_runs_the_prompt_by_one_method() -> None:
    """`_prefill`, whose chunks are as long as its `generation_config.prefill_chunk_size`."""
    model, ids = tiny_llava(), torch.tensor([[5, 6, 7, 8, 9]])
    prefill, lengths, configs = getattr(model, PREFILL), [], []

    def ours(input_ids: torch.Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        assert torch.equal(input_ids, ids)
        configs.append(generation_config.prefill_chunk_size)
        return prefill(input_ids, generation_config, *args, **kwargs)

    setattr(model, PREFILL, ours)
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(input_ids=ids, max_new_tokens=2, prefill_chunk_size=2)
    model.generate(input_ids=ids, max_new_tokens=2)
    assert configs == [2, None]
    assert lengths == [2, 2, 1, 1, 5, 1]


def test_tiles_of_an_image() -> None:
    """`get_anyres_image_grid_shape`: rows and columns of the best of the sizes that are allowed."""
    assert tiles_of((300, 700), [[336, 672], [672, 336]], 336) == (1, 2)
    assert tiles_of(torch.tensor([700, 300]), [[336, 672], [672, 336]], 336) == (2, 1)


def test_windows_of_a_tower() -> None:
    """`get_vision_window_index`: which token comes where, window by window."""
    config = SimpleNamespace(spatial_merge_size=2, window_size=16, patch_size=4)
    order = window_order(config, torch.tensor([[1, 4, 6], [1, 2, 6]]))
    windows = [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
    assert order.tolist() == [token for window in windows for token in window]


def test_decoders_have_as_many_layers_as_their_config_says() -> None:
    """`num_hidden_layers`, and lists with an entry for each layer."""
    config = tiny_llava(layers=5).config
    few = of_layers(config, 2)
    assert len(type(tiny_llava())(few).model.language_model.layers) == 2
    assert config.text_config.num_hidden_layers == 5
    assert of_layers(config, 9).text_config.num_hidden_layers == 5
    gemma = transformers.Gemma3TextConfig(num_hidden_layers=12)
    assert of_layers(gemma, 7).layer_types == gemma.layer_types[:7]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_encode_by_these_functions(case: Any) -> None:
    model = case.model()
    base = family_of(model).base(model)
    assert callable(getattr(base, ENCODE_IMAGES))
    assert callable(getattr(base, ENCODE_VIDEOS, None)) or not case.videos
