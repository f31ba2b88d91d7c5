"""The entry point by which vLLM finds pore: it calls `register` in each of its processes."""

from __future__ import annotations

from typing import Any

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
    from vllm.platforms import current_platform

    known = ModelRegistry.get_supported_archs()
    for architecture, where in MODELS.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, where)
    if current_platform.is_cpu():
        _correct_positions_on_cpus()


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
