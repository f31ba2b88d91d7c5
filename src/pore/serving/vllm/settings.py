"""What is to be pruned in a vLLM server, and how: the entry `pore` of the model's config.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{
        "architectures": ["PoreLlavaForConditionalGeneration"],
        "pore": {"method": "FasterVLM", "keep": 64}}'

In place of the settings, `pore` may name a JSON file that holds them. `{"by_request": true}` in
place of a method lets every request say what is kept of its images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from pore._saved.parsing import read_json
from pore.engine.limits import check_limits
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.errors import InputError, UnsupportedModelError
from pore.families.base import Family
from pore.families.registry import family_of_config
from pore.methods.making import make
from pore.methods.settings import read_budget

SETTINGS = "pore"
"""The entry of the config."""

BY_REQUEST = "by_request"
"""The setting that lets requests choose."""

_LONGEST = 1 << 16  # bytes of a file of settings
_LARGEST = 36  # tokens along a side of the picture that is tried out, as many as usual ones have


def by_request(config: Any) -> bool:
    """Whether requests say what is kept, and no method does.

    Args:
        config: The config of the whole model, with the server's overrides.

    Raises:
        InputError: The settings say both, or are wrong.
    """
    found = _settings(getattr(config, SETTINGS, None))
    if BY_REQUEST not in found:
        return False
    if found != {BY_REQUEST: True}:
        raise InputError(
            f'"{SETTINGS}" is either {{"{BY_REQUEST}": true}} and nothing else, or a method with '
            'its settings, such as {"method": "FasterVLM", "keep": 64}.'
        )
    return True


def pruner_of(config: Any) -> Pruner:
    """The method that a served model's config asks for.

    Args:
        config: The config of the whole model, with the server's overrides.

    Returns:
        The method.

    Raises:
        InputError: The settings are missing or wrong; says which.
        UnsupportedModelError: The method cannot run inside vLLM; says why, and what to do instead.
    """
    found = _settings(getattr(config, SETTINGS, None))
    method, keep = found.pop("method", None), found.pop("keep", None)
    if BY_REQUEST in found:
        raise InputError(
            f"{config.model_type} takes no indices by request; start a stock server with "
            "--enable-mm-embeds, to which pore.serving.vllm.client.VLLMClient sends embeddings."
        )
    if not isinstance(method, str):
        raise InputError(f'"{SETTINGS}" names no method, such as {{"method": "FasterVLM"}}.')
    if isinstance(keep, str):
        keep = read_budget(keep)
    if not isinstance(keep, (int, float)) or isinstance(keep, bool):
        raise InputError(
            f'"{SETTINGS}" has no budget, such as {{"keep": 64}}, {{"keep": 0.25}} or '
            '{"keep": "25%"}.'
        )
    texts = [f"{name}={json.dumps(value)}" for name, value in found.items()]
    model: Any = SimpleNamespace(config=config)
    pruner = make(method, model, keep, texts=texts)
    family = family_of_config(config, config.model_type)
    check_limits(pruner, family)
    _check(pruner, family)
    return pruner


def trial_side(keep: Any) -> int:
    """Along a side, the visual tokens of a square picture of which a method keeps something.

    Args:
        keep: Its budget, a number of tokens or a share; of another kind, any picture will do.
    """
    if isinstance(keep, float):
        return min(math.isqrt(math.ceil(1 / keep)) + 4, _LARGEST)
    return math.isqrt(keep if isinstance(keep, int) else 0) + 4


def _settings(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = read_json(given, _LONGEST)
        except (OSError, ValueError) as error:
            raise InputError(
                f'"{SETTINGS}" is {given[:200]!r}, which is to be a JSON file with settings, and '
                f"cannot be read: {error}"
            ) from error
    if not isinstance(given, Mapping):
        raise InputError(
            f'The model is to prune, but its config has no "{SETTINGS}" with settings, nor the '
            f"name of a JSON file that holds them; add to --hf-overrides "
            f'"{SETTINGS}": {{"method": "FasterVLM", "keep": 64}}.'
        )
    return dict(given)


def _check(pruner: Pruner, family: Family) -> None:
    """Refuse a method that needs the decoder, which here is vLLM's, or that leaves images whole."""
    if pruner.videos_only:
        raise UnsupportedModelError(
            f"{pruner.name} is for videos and leaves images whole; vLLM has pruning of videos of "
            "its own (--video-pruning-rate)."
        )
    stages = [stage for stage in pruner.stages() if isinstance(stage, Stage)]
    inside = [stage for stage in stages if stage.layer > 0 or stage.reads_layer is not None]
    if inside:
        raise UnsupportedModelError(
            f"{pruner.name} looks into decoder layers, and vLLM's decoder has one number of tokens "
            "for all layers; rank outside of the server and send what is kept "
            "(pore.serving.vllm.client.VLLMClient), or use a method that acts in the vision tower "
            "or on the embeddings."
        )
    if not family.mrope and any(not stage.dense for stage in stages):
        raise UnsupportedModelError(
            f"{pruner.name} leaves gaps where it drops tokens, and vLLM counts the positions of "
            f"{family.name} without; use a method that numbers positions anew."
        )
