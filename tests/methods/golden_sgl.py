"""Golden files of SGL: a small and a large Llama of the authors' fork, from answer to answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import pore
from helpers.caches import as_argument
from pore._compat.caches import cache_in
from pore.engine.run import Run

_KEYS = {
    "cache_lengths", "consistency_score", "decode_logits", "importance", "importance_order",
    "input_ids", "keep_indices", "large_sequences", "logits", "small_confidence", "small_sequences",
    "visual_features_large", "visual_features_small",
}  # fmt: skip
_TOLERANCE = 1e-4


class _Worst:
    """The largest relative difference met so far."""

    value = 0.0

    def compare(self, got: Tensor, expected: Tensor) -> None:
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale)
        self.value = max(self.value, (got - expected).abs().max().item() / scale)


def check(file: Any) -> float:
    """Assert that pore gives what the file holds.

    Returns:
        The largest difference of a floating-point result, relative to the largest expected value.
    """
    params, worst = file.params, _Worst()
    assert params["level"] == "e2e_llm"
    weights = {k: v for k, v in file.tensors.items() if k.startswith(("small.", "large."))}
    tensors = {k: v for k, v in file.tensors.items() if k not in weights}
    assert tensors.keys() == _KEYS, tensors.keys() ^ _KEYS
    ids = tensors["input_ids"]
    visual = ids == params["image_token_id"]
    assert visual.sum() == params["N"] == tensors["importance"].numel()
    assert visual[0, params["start"]]
    small = _model(params, "small", weights)
    inputs = _inputs(small, ids, visual, tensors["visual_features_small"])

    answer = tensors["small_sequences"]  # shorter than allowed where the authors' run met an end
    assert 0 < len(answer) <= params["max_new_tokens"]
    guide = pore.guide(small, inputs, max_new_tokens=len(answer), visual=visual)
    assert guide.sequences[0].tolist() == answer.tolist()
    assert bool(guide.answered.all())
    worst.compare(guide.importance[0], tensors["importance"])
    worst.compare(guide.confidence[0], tensors["small_confidence"])
    order = guide.importance[0].argsort(descending=True)
    worst.compare(tensors["importance"][order], tensors["importance"][tensors["importance_order"]])

    keep = float(params["consistency_token_ratio"])
    pruner = pore.SGL(keep, layer=0, guide=guide, faithful=True)
    assert pruner.counts(params["N"], 1) == [params["consistency_kept_visual"]]
    score = pore.consistency(small, inputs, guide, keep=keep, faithful=True)
    worst.compare(score[0], tensors["consistency_score"])

    large = _model(params, "large", weights)
    layer = params["prune_before_layer_0based"]
    depth = params["large_config"]["num_hidden_layers"]
    assert layer == int(depth * params["large_model_prune_layer"])
    pruner = pore.SGL(float(params["large_model_prune_ratio"]), layer, guide, faithful=True)
    assert pruner.counts(params["N"], depth)[-1] == params["kept_visual"]
    inputs = _inputs(large, ids, visual, tensors["visual_features_large"])
    with torch.no_grad(), pruner(large) as run:
        run.mark_visual(visual)
        _check_large(large, run, inputs, tensors, params["start"], worst)
    return worst.value


def _check_large(
    model: LlavaForConditionalGeneration,
    run: Run,
    inputs: dict[str, Tensor],
    tensors: dict[str, Tensor],
    start: int,
    worst: _Worst,
) -> None:
    out = model(**inputs, use_cache=True)
    (image,) = run.report.samples[0].images
    length = inputs["inputs_embeds"].shape[1]
    kept = [i for i in range(length) if not start <= i < start + image.seen]
    kept = sorted(kept + [start + i for i in image.kept])
    assert kept == tensors["keep_indices"].tolist()
    worst.compare(out.logits, tensors["logits"])
    answer, cache, last = tensors["large_sequences"], cache_in(out), out.logits[0, -1]
    assert last.argmax() == answer[0]
    for token, following, logits in zip(
        answer[:-1], answer[1:], tensors["decode_logits"], strict=True
    ):
        step = model(input_ids=token.view(1, 1), **as_argument(cache)).logits[0, -1]
        worst.compare(step, logits)
        assert step.argmax() == following
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == tensors["cache_lengths"].tolist()
    ids = model.generate(**inputs, max_new_tokens=len(answer), do_sample=False)
    assert ids[0].tolist() == answer.tolist()


def _inputs(
    model: LlavaForConditionalGeneration, ids: Tensor, visual: Tensor, features: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    embeds[visual] = features[0]
    return {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}


def _model(
    params: dict[str, Any], which: str, weights: dict[str, Tensor]
) -> LlavaForConditionalGeneration:
    """A LLaVA around one of the file's language models."""
    config = LlavaConfig(
        text_config=LlamaConfig(**params[f"{which}_config"]),
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8,
            patch_size=8,
        ),
        image_token_index=params["image_token_id"],
    )
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    own = {k.removeprefix(f"{which}."): v for k, v in weights.items() if k.startswith(f"{which}.")}
    model.lm_head.load_state_dict({"weight": own.pop("lm_head.weight")})
    model.model.language_model.load_state_dict(
        {k.removeprefix("model."): v for k, v in own.items()}
    )
    model.generation_config.eos_token_id = None
    return model
