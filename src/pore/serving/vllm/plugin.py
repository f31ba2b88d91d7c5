"""The entry point by which vLLM finds pore: it calls `register` in each of its processes."""

from __future__ import annotations

from functools import cache
from typing import Any

from pore.errors import PoreError
from pore.serving.vllm.indices import MODEL_TYPES
from pore.serving.vllm.settings import by_request, pruner_of

MODELS = {
    "PoreLlavaForConditionalGeneration": "pore.serving.vllm.llava:PoreLlava",
    "PoreLlavaNextForConditionalGeneration": "pore.serving.vllm.llava:PoreLlavaNext",
    "PoreQwen2_5_VLForConditionalGeneration": "pore.serving.vllm.qwen_vl:PoreQwen25VL",
    "PoreQwen3VLForConditionalGeneration": "pore.serving.vllm.qwen_vl:PoreQwen3VL",
}
"""The architectures that prune, by the names that a served model asks for. Nothing changes for a
model that does not."""


def register() -> None:
    """Tell vLLM of the architectures that prune; called again, it does nothing more."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform

    known = ModelRegistry.get_supported_archs()
    for architecture, where in MODELS.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, where)
        MODELS_CONFIG_MAP.setdefault(architecture, _checking())
    if current_platform.is_cpu():
        _correct_positions_on_cpus()


@cache
def _checking() -> Any:
    """What vLLM asks when it has a config, before it starts the processes of the engine.

    A reason that one of these gives is hundreds of lines above the end of the log.
    """
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Checking(VerifyAndUpdateConfig):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_settings(vllm_config.model_config.hf_config)

    return Checking


def check_settings(config: Any) -> None:
    """Refuse settings that are wrong, or ask for what cannot run inside vLLM.

    Args:
        config: The config of the whole model, with the server's overrides.

    Raises:
        RuntimeError: Says why. Pydantic, which builds vLLM's configs, would wrap other errors.
    """
    try:
        if config.model_type not in MODEL_TYPES or not by_request(config):
            pruner_of(config)
    except PoreError as error:
        raise RuntimeError(str(error)) from error


def _correct_positions_on_cpus() -> None:
    """Let the runner for CPUs ask whether a model prunes.

    The runner for GPUs asks when it has loaded a model. That for CPUs, which derives from it, loads
    models by a method of its own, and in vLLM 0.32 leaves this out.
    """
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model
    if getattr(load, "asks", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        settings = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            supports_multimodal_pruning(self.get_model())
            and settings is not None
            and settings.is_multimodal_pruning_enabled()
        )

    load_model.asks = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
