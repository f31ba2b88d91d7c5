"""Copies of a pruned model, threads that outlive a block, models let go, and runs within runs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
import pore.pruner
from family_cases import CASES
from interrupting import whole_state
from models import batch, prompt, tiny_llava
from pore.changes import changes_in
from pore.errors import ModelStateError, PoreError
from pore.families import family_of
from pore.guiding import guide
from pore.pruner import Pruner, Run
from test_engine import flash  # noqa: F401 - a kernel of FlashAttention's contract, "flash_test"
