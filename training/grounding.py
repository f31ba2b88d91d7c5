"""Attention supervision for visual instruction tuning."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from visual import VisualBatch


class Grounding:
    """Makes one decoder layer look at what a question is about.

    Half of the layer's heads are drawn to the first thing that a question names, the other half to
    the second; for questions about one thing, the other half is left alone. The gradient that
    answers alone give to attention is so weak that a model of this size spends hours on a plateau;
    the scenes know where everything is, so the model can be told. The layers at which FastV scores
    are not touched.
    """

    def __init__(self, model: LlavaForConditionalGeneration, layer: int) -> None:
        """Record the layer's attention.

        Args:
            model: The model.
            layer: Index of the decoder layer.
        """
        self.decoder = model.model.language_model
        self.attention = self.decoder.layers[layer].self_attn
        self.states: Tensor | None = None
        self.attention.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: object, arguments: object, kwargs: dict[str, Tensor]) -> None:
        self.states = kwargs["hidden_states"]

    def loss(self, batch: VisualBatch, first_visual: int) -> Tensor:
        """Mean of minus the logarithm of the attention that the referents receive.

        Args:
            batch: The batch that just went through the model.
            first_visual: Position of the first visual token.
        """
        weights = self._log_weights(batch, batch.asked)
        visual = weights[..., first_visual : first_visual + batch.referents.shape[-1]]
        half = visual.shape[1] // 2
        losses = []
        for i, heads in enumerate((slice(0, half), slice(half, None))):
            target = batch.referents[:, i, None]
            mass = visual[:, heads].masked_fill(~target, -torch.inf).logsumexp(-1)
            two = (batch.referents[:, 0] != batch.referents[:, 1]).any(-1)
            losses.append((mass if i == 0 else mass[two]).clamp_min(-20).flatten())
        return -torch.cat(losses).mean()

    def counting_loss(self, batch: VisualBatch, first_visual: int) -> Tensor:
        """Draw the second half of the heads to what is counted, each object and BOS alike.

        Attention averages, so a head that looks at nothing but the objects asked for cannot tell
        how many there are. With one share of n + 1 left on the first token, n can be read off.

        Args:
            batch: The batch that just went through the model.
            first_visual: Position of the first visual token.
        """
        weights = self._log_weights(batch, batch.counting)
        weights = weights[:, weights.shape[1] // 2 :]
        visual = weights[..., None, first_visual : first_visual + batch.counted.shape[-1]]
        there = batch.counted.any(-1)[:, None]
        each = visual.masked_fill(~batch.counted[:, None], -torch.inf).logsumexp(-1)
        total = torch.where(there, each, 0.0).clamp_min(-20).sum(-1)
        total = total + weights[..., 0].clamp_min(-20)
        share = there.sum(-1) + 1
        return -(total / share + share.log()).mean()

    def _log_weights(self, batch: VisualBatch, asked: Tensor) -> Tensor:
        """Log-attention ``(N, heads, T)`` of the tokens at ``asked``, ``(N, 2)`` row and index."""
        assert self.states is not None
        row, index = asked.unbind(1)
        width = self.attention.head_dim
        keys = self.attention.k_proj(self.states).unflatten(-1, (-1, width)).transpose(1, 2)
        queries = self.attention.q_proj(self.states[row, index]).unflatten(-1, (-1, width))
        cos, sin = self.decoder.rotary_emb(self.states, batch.positions)
        _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
        queries, _ = apply_rotary_pos_emb(
            queries[:, :, None], queries[:, :, None], cos[row, index, None], sin[row, index, None]
        )
        scores = (queries @ keys[row].transpose(-1, -2)).squeeze(2).float() / width**0.5
        visible = batch.mask[row, 0, index][:, None]
        log_weights: Tensor = scores.masked_fill(~visible, -torch.inf).log_softmax(-1)
        return log_weights
