"""Where accelerate, and configs, say what weights are."""

from __future__ import annotations

import accelerate
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import LlavaConfig

from pore._compat.weights import commit, execution_device


def test_offloaded_modules_know_where_they_compute() -> None:
    """`module._hf_hook.execution_device` of accelerate."""
    module = nn.Linear(2, 2)
    accelerate.cpu_offload(nn.Sequential(module), execution_device=torch.device("cpu"))
    assert module.weight.device.type == "meta"
    assert execution_device(module) == torch.device("cpu")


def test_commit_of_a_checkpoint() -> None:
    """`config._commit_hash`, which configs of transformers 5.16 take from the hub.

    From 5.18 on nothing tells the commit, so that it is unknown.
    """
    config = LlavaConfig(_commit_hash="abc")
    told = Version(transformers.__version__) < Version("5.18")
    assert commit(config) == ("abc" if told else None)
    assert commit(LlavaConfig()) is None
