"""The invariants of pruning, which must hold in a model whatever its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.attention import kernel_names
from pore._compat.modules import AFTER, BEFORE
from pore.checking.reference import hidden_from
from pore.checking.subject import ANSWER, KEEP, Finding, Subject
from pore.families.registry import images_of


def keep_all(subject: Subject, place: str) -> Finding:
    """Keeping everything gives the unpruned logits, bit for bit."""
    everything: Any = replace(subject.methods[place], keep=1.0)  # type: ignore[type-var]
    with everything(subject.model):
        got = subject.forward(subject.all)
    if torch.equal(got, subject.dense):
        return True, "bit for bit"
    return False, "logits differ from the unpruned ones: " + subject.close(got, subject.dense)[1]


def masked_dense(subject: Subject, place: str) -> Finding:
    """A pruned forward equals one over all tokens in which the dropped ones are masked."""
    got, samples = subject.pruned(place)
    dropped = subject.dropped(samples)
    left = subject.all["attention_mask"].bool() & ~dropped
    if not bool(dropped.any()):
        return False, "nothing was dropped"
    if got.shape[1] != int(left.sum(1).max()):
        return False, f"{got.shape[1]} tokens are left, not {int(left.sum(1).max())}"
    rows = [own[len(own) - int(n) :] for own, n in zip(got, left.sum(1), strict=True)]
    return subject.close(torch.cat(rows), subject.masked(place, subject.all, dropped)[left])


def scores(subject: Subject, place: str) -> Finding:
    """The tokens kept are those that the last text token attends to most."""
    _, samples = subject.pruned(place)
    tokens = subject.all["attention_mask"].bool()
    nothing = torch.zeros_like(tokens)
    with hidden_from(subject.model, subject.family, 0, nothing, tokens) as weights:
        subject.forward(subject.all, use_cache=False)
    rows = weights[subject.layer - 1][:, :, -1].mean(1)
    for image in images_of(subject.model, subject.all):
        best = rows[image.row, list(image.columns)].topk(KEEP).indices.sort().values.tolist()
        kept = list(samples[image.row].images[image.index].kept)
        if kept != best:
            return False, f"sample {image.row} keeps {kept}, but attends most to {best}"
    return True, "the same tokens as by attention computed separately"


def batch(subject: Subject, place: str) -> Finding:
    """A batch, padded on the left, equals its samples one by one."""
    got, samples = subject.pruned(place)
    rows, singles = [], []
    for i, sample in enumerate(samples):
        with subject.methods[place](subject.model) as run:
            single = subject.model(**subject.inputs([i])).logits[0]
        (alone,) = run.report.samples
        kept = [[list(image.kept) for image in one.images] for one in (sample, alone)]
        if kept[0] != kept[1]:
            return False, f"sample {i} keeps {kept[0]} in a batch, {kept[1]} by itself"
        singles.append(single)
        rows.append(got[i, got.shape[1] - len(single) :])
    return subject.close(torch.cat(rows), torch.cat(singles))


def cached(subject: Subject, place: str) -> Finding:
    """Prefill and cached decoding equal one forward over prompt and answer without a cache."""
    with subject.methods[place](subject.model) as run:
        out = subject.generate(subject.all)
    full = subject.answered(subject.all, out.sequences[:, :-1])
    if subject.references(place):
        dropped = nn.functional.pad(subject.dropped(run.report.samples), (0, ANSWER - 1))
        wanted = subject.masked(place, full, dropped)
    else:
        with subject.methods[place](subject.model):  # this method chooses by the image alone
            wanted = subject.forward(full, use_cache=False)
    return subject.close(torch.stack(out.logits, 1), wanted[:, -ANSWER:])


def positions(subject: Subject) -> Finding:
    """The first token of a prompt has the position at which this family starts."""
    rotary = getattr(subject.family.decoder(subject.model), "rotary_emb", None)
    if rotary is None:
        return True, "the decoder has no rotary positions to look at"
    tables: list[Any] = []
    hook = rotary.register_forward_hook(lambda _, __, table: tables.append(table))
    try:
        inputs = subject.inputs([0])
        subject.model(**inputs)
        subject.forward(inputs)
    finally:
        hook.remove()
    for table in tables:
        if isinstance(table, Tensor):
            angles = torch.angle(table)
        else:
            angles = torch.atan2(table[1].float(), table[0].float())
        # Text has the same positions on every axis, and one position is the angle of a frequency.
        first, second = angles.flatten(0, -3)[0, :2]
        step = second - first
        if not torch.allclose(first, subject.family.first_position * step, atol=1e-2):
            return False, f"it does not start at position {subject.family.first_position}"
    return True, f"from {subject.family.first_position} on"


def invariants(subject: Subject, exact: bool) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The invariants by name, each with the function that tests it.

    Args:
        subject: A twin with its prompts.
        exact: Whether to compare what rounding can change too: which tokens are kept.
    """
    yield "positions are those that pore counts", partial(positions, subject)
    for place, pruner in subject.methods.items():
        of_what = f"{pruner.name} ({place}): "
        yield f"{of_what}keep-all is bit-equal", partial(keep_all, subject, place)
        compared = subject if subject.references(place) else subject.wide
        if compared is not None:
            yield f"{of_what}pruned equals masked dense", partial(masked_dense, compared, place)
        if exact and place == "decoder":
            yield f"{of_what}keeps what attention ranks first", partial(scores, subject, place)
        if exact:
            yield f"{of_what}batch equals singles", partial(batch, subject, place)
        yield f"{of_what}cached decoding equals a full forward", partial(cached, subject, place)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything in a model, by module, where a pruner could leave traces."""
    found: dict[str, Any] = {
        name or type(model).__name__: (
            type(module),
            sorted(key for key, value in vars(module).items() if key[0] != "_" or callable(value)),
            list(vars(module)[BEFORE]),
            list(vars(module)[AFTER]),
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    }
    config: Any = model.config
    return found | {"the config": config.to_json_string(), "the kernels": kernel_names()}


def left_clean(model: nn.Module, before: Mapping[str, Any]) -> Finding:
    """Nothing is left of a pruner in the model, nor in transformers' tables of kernels.

    Args:
        model: The model.
        before: Its `fingerprint` before it was pruned.
    """
    after = fingerprint(model)
    changed = [name for name in after if after[name] != before.get(name)]
    if not changed:
        return True, "no hook, attribute, config or kernel is left"
    return False, f"something is left in {', '.join(changed[:3])}"
