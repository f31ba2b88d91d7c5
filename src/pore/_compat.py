"""What we use of transformers, torch and accelerate that they do not promise to keep.

All of it is here, each with what it is and why nothing public does. `tests/test_compat.py` names
each and says what it must mean, so that a version that drops one fails there and by name.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pore.errors import UnsupportedModelError

TESTED = ("5.16.0", "5.20.0", "5.23.0", "5.24.0")


"""The versions of transformers that all tests were run on, the newest last.

On a newer one the library proves itself for a kind of model before it prunes one (`checking`)."""


def newest_tested() -> str:
    """The newest version of transformers that all tests were run on."""
    return TESTED[-1]


def beyond_tested() -> bool:
    """Whether this transformers is newer than that."""
    import transformers  # late: it takes transformers seconds
    from packaging.version import Version

    return Version(transformers.__version__) > Version(newest_tested())


DEEPSTACK = "_deepstack_process"


"""The method of a Qwen3-VL decoder that adds features of lower tower layers to visual tokens.

It runs between two decoder layers, where no hook reaches."""


PREFILL = "_prefill"


"""The method by which `generate` runs a prompt: given token ids and the generation config first.

Only there is it known that what the model is called with is a piece of a prompt."""


_EAGER = "eager_attention_forward"


SPARED_ROWS = "_maybe_slice_kv_shared_inputs"


"""The method of a Gemma 4 decoder that leaves the last tokens alone to the layers that share keys.

Only the tokens whose logits are asked for go through them, as no token looks at another's states
there. It runs between two decoder layers, where no hook reaches."""


SHARED_KEYS = "shared_kv_states"


"""The argument by which decoder layers hand on keys and values to later ones, by kind of layer."""


BEFORE, AFTER = "_forward_pre_hooks", "_forward_hooks"


HOOKS = {
    BEFORE: ("_forward_pre_hooks_with_kwargs",),
    AFTER: ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


"""Where torch keeps the hooks of a module by number, and of those how they are to be called.

`register_forward_hook` gives a handle that takes a hook out, but only once it is in: an interrupt
may come between."""


STATE = "__getstate__"


"""The method that says what copies and pickles of a module hold; Python looks in the object first.

`copy.copy`, `copy.deepcopy` and `pickle` all ask it, through `object.__reduce_ex__`."""


CALL = "_call_impl"


"""The method of a module that its `__call__` is: hooks, and the forward between them.

torch runs hooks after an exception too, where they ask for it, but not after Ctrl-C."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that transformers made, out of the wrapping of torch.compile and of peft.

    `_orig_mod` is the module that `torch.compile` compiled.
    """
    wrapped: Any = model
    if hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped._orig_mod
    if hasattr(wrapped, "get_base_model"):
        wrapped = wrapped.get_base_model()
    return wrapped  # type: ignore[no-any-return]


def whereabouts(threads: Iterable[int]) -> list[tuple[int, int]]:
    """Where in its code each of some threads is, by their `get_ident`; none for those that ended.

    `sys._current_frames` is CPython's. A thread that waits stays where it is.
    """
    frames = sys._current_frames()
    found = [frames[thread] for thread in threads if thread in frames]
    return [(id(frame), frame.f_lasti) for frame in found]


def execution_device(module: nn.Module) -> torch.device:
    """Where accelerate computes a module whose weights it has offloaded.

    `_hf_hook` is accelerate's hook on the module; its weights are on "meta" until it is called.
    """
    hooked: Any = module
    return torch.device(hooked._hf_hook.execution_device)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed torch's generator of the CPU, and put it back afterwards.

    `torch.manual_seed` would seed those of the other devices too, which `fork_rng` puts back only
    where it is told of each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def commit(config: Any) -> str | None:
    """The revision on the hub of a checkpoint, as its config was told.

    `_commit_hash` is where `from_pretrained` notes it, up to transformers 5.17; and `note_commit`.
    None where neither did.
    """
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def note_commit(config: Any, revision: str) -> None:
    """Let a config tell the revision it was loaded from; `to_dict` leaves `_commit_hash` out."""
    config._commit_hash = revision


# -- weights --------------------------------------------------------------------------------------


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place: `_version`; None where nothing counts it."""
    return None if tensor.is_inference() else tensor._version


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor is made of: itself, but where it wraps others, as quantised ones.

    `__tensor_flatten__` is how they are named to torch.compile.
    """
    wrapped: Any = tensor
    if not hasattr(wrapped, "__tensor_flatten__"):
        return [tensor]
    names, _ = wrapped.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(wrapped, name))]


def loaded_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint of a model would hold, by name; what is offloaded, as it is read.

    `_hf_hook` is accelerate's hook on a module whose weights it has offloaded; they are on "meta"
    until it is called.
    """
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        path, _, own = name.rpartition(".")
        if tensor.device.type != "meta" or not hasattr(model.get_submodule(path), "_hf_hook"):
            yield name, tensor
            continue
        from accelerate.utils import align_module_device, has_offloaded_params

        module = model.get_submodule(path)
        if not has_offloaded_params(module):
            yield name, tensor
            continue
        with align_module_device(module, torch.device("cpu")):
            yield name, getattr(module, own)


def adapter_states(model: nn.Module) -> list[Any]:
    """Of every layer with adapters of peft, which are active and how much each counts."""
    found: list[Any] = []
    for name, module in model.named_modules():
        layer: Any = module
        # Models of transformers have methods of this name, layers of peft a property.
        if isinstance(off := getattr(layer, "disable_adapters", None), bool):
            scaling = {key: str(value) for key, value in getattr(layer, "scaling", {}).items()}
            found.append([name, off, list(layer.active_adapters), scaling])
    return found


def from_config(
    kind: Any, config: Any, dtype: torch.dtype, attention: dict[str, str], experts: str | None
) -> Any:
    """A model of a class with the weights of its initialiser.

    `_from_config` is what the auto classes build a model with.

    Args:
        kind: The class of the model.
        config: Its config.
        dtype: Type of its weights.
        attention: The attention kernel of every part: "" for the whole, or a name of
            `sub_configs`.
        experts: What multiplies a mixture of experts; None is the choice of transformers.
    """
    return kind._from_config(
        config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
    )


def experts_name(config: Any) -> str | None:
    """What multiplies the experts of a model, such as "grouped_mm": `_experts_implementation`."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def random_model(kind: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A model with its parameters left as they were allocated.

    `_from_config` is what the auto classes build a model with, in a dtype and with an attention
    kernel; `no_init_weights` spares it the minutes that initialising 7B parameters takes.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return kind._from_config(config, dtype=dtype, attn_implementation=attention)


# -- arguments and outputs ------------------------------------------------------------------------

IDS = "input_ids"


"""(B, L) token ids of a model's prompt."""


EMBEDS = "inputs_embeds"


"""What enters a decoder: (B, L, D)."""


HIDDEN = "hidden_states"


"""What enters a decoder layer, mostly by place: (B, L, D)."""


MASK = "attention_mask"


"""Of a model, a decoder or a layer."""


POSITIONS = "position_ids"


"""(B, L) or, on several axes, (3 or 4, B, L)."""


ROTARY = "position_embeddings"


"""Rotary tables of a decoder layer, or two of them by kind of layer."""


WANTED = "logits_to_keep"


"""The tokens whose logits are asked for: a number of last ones, or positions."""


TOWER_READ = ("vision_feature_layer", "vision_feature_select_strategy")


"""What of the vision tower the projector reads; of a call, or else of the config."""


LABELS = "labels"


"""(B, L) the tokens that a loss is of, -100 where it is of none."""


ROUTER_LOGITS = "output_router_logits"


"""Asks for a loss that balances experts."""


PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")


"""Where samples start that lie in one row, for FlashAttention."""


DEEPSTACK_WHERE = "visual_pos_masks"


DEEPSTACK_WHAT = "deepstack_visual_embeds"


"""Arguments of a Qwen3-VL decoder: which tokens are visual, and what is added to them."""


_CACHE = ("cache", "past_key_values")


"""What forwards call the cache, newest first: `cache` since transformers 5.24."""


DECODER = frozenset(
    {IDS, EMBEDS, MASK, POSITIONS, WANTED, DEEPSTACK_WHERE, DEEPSTACK_WHAT, *_CACHE}
    | {"per_layer_inputs", "use_cache"}
)


"""All arguments that decoders have; the engine knows what becomes of each."""


LAYER = frozenset(
    {HIDDEN, MASK, POSITIONS, ROTARY, SHARED_KEYS, *_CACHE} | {"per_layer_input", "use_cache"}
)


"""All arguments that decoder layers have, likewise."""


@lru_cache(maxsize=1)
def _cache_class() -> type:
    from transformers import Cache  # late: it takes transformers seconds

    kind: type = Cache
    return kind


def cache_in(values: Mapping[str, Any] | Iterable[Any] | None) -> Any:
    """The cache among arguments or outputs, whatever it is called there; None where there is none.

    Args:
        values: Arguments by name, a `ModelOutput`, or a tuple.
    """
    kind = _cache_class()
    given = values.values() if isinstance(values, Mapping) else values or ()
    return next((value for value in given if isinstance(value, kind)), None)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with None in place of the cache."""
    kind = _cache_class()
    return {name: None if isinstance(v, kind) else v for name, v in kwargs.items()}


@lru_cache(maxsize=64)
def check_interface(kind: type) -> None:
    """Refuse a decoder or a layer whose arguments go by names that pore does not know.

    Args:
        kind: The class of a decoder or of a decoder layer.

    Raises:
        UnsupportedModelError: It takes no mask, no positions or no cache by a known name.
    """
    import transformers

    names = set(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    for what, known in (("mask", {MASK}), ("positions", {POSITIONS, ROTARY}), ("cache", {*_CACHE})):
        if not names & known:
            raise UnsupportedModelError(
                f"{kind.__name__} of transformers {transformers.__version__} takes no {what} by a "
                f"name that this version of pore knows ({', '.join(sorted(known))}); use a version "
                "of transformers that it was tested with, or a newer pore."
            )


def cache_argument(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The cache as an argument of a function of transformers, by the name that it has there.

    Args:
        function: The forward of a model, a decoder or a layer, or what makes masks.
        cache: A cache, or None.

    Raises:
        UnsupportedModelError: The function takes none by a name that pore knows.
    """
    names = inspect.signature(function).parameters
    name = next((name for name in _CACHE if name in names), None)
    if name is None:
        raise UnsupportedModelError(
            f"{getattr(function, '__qualname__', function)} takes no cache by a name that this "
            f"version of pore knows ({', '.join(_CACHE)}); use a version of transformers that it "
            "was tested with, or a newer pore."
        )
    return {name: cache}


def loss_of(model: nn.Module) -> Callable[..., Any]:
    """The loss that a model's own forward computes: called with logits, labels and vocab_size.

    It takes `shift_labels` in place of labels that are still to be shifted.
    """
    loss: Callable[..., Any] = model.loss_function  # type: ignore[assignment]
    return loss


def text_vocabulary(config: Any) -> int:
    """How many tokens there are."""
    size: int = config.get_text_config().vocab_size
    return size


# -- attention ------------------------------------------------------------------------------------


def attention_name(config: Any) -> str | None:
    """The name of the attention kernel that a config asks for, such as "sdpa".

    `_attn_implementation` is where modules read it, at every call. None where there is none.
    """
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def uses_flash(config: Any) -> bool:
    """Whether that kernel has FlashAttention's contract: 2-D masks or none, tokens in order."""
    return "flash" in str(attention_name(config))


def with_attention(config: Any, name: str) -> Any:
    """A copy of a config that asks for another attention kernel.

    `_attn_implementation` is a property, which checks a name and spreads it to sub-configs; what it
    gives is `_attn_implementation_internal`.
    """
    own = copy.copy(config)
    own._attn_implementation_internal = name
    return own


def attention_kernel(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The kernel of a name, as an attention module calls it; None where there is none to be found.

    Eager attention is no kernel of `ALL_ATTENTION_FUNCTIONS`: a function `eager_attention_forward`
    lies beside each model's own modules. Llama 4 has another for its tower, whose name ends alike;
    the module's `forward` names the one that it uses.
    """
    if name != "eager":
        kernel: Callable[..., Any] = _kernels()[name]
        return kernel
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    used = getattr(code, "co_names", ())
    eager = next((own for own in used if own.endswith(_EAGER)), _EAGER)
    for base in type(module).__mro__:
        found = getattr(sys.modules[base.__module__], eager, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def register_attention(name: str, kernel: Callable[..., Any]) -> Callable[[], None]:
    """Make a kernel known by a name to all models; what is returned takes it back.

    The name holds no kernel alive, nor then the model that is behind it, and goes with it.
    """

    def gone(_: object) -> None:
        forget_attention(name)

    held = weakref.ref(kernel, gone)

    def registered(*args: Any, **kwargs: Any) -> Any:
        kernel = held()
        assert kernel is not None
        return kernel(*args, **kwargs)

    _kernels().register(name, registered)
    return partial(forget_attention, name)


def forget_attention(name: str) -> None:
    """Make a name of ours unknown again, if it is known.

    Registering is public, taking back is not: `del` forgets what one model file overrides, and
    `_global_mapping` is what all of them share.
    """
    _kernels()._global_mapping.pop(name, None)


def _kernels() -> Any:
    # Imported late: it takes transformers seconds, which `import pore` should not.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def kernel_names() -> list[str]:
    """The names of all attention kernels and of what makes masks for them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return [*sorted(_kernels().keys()), *sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys())]


def layer_number(attention: nn.Module) -> int:
    """Which layer of the cache an attention module fills: `layer_idx`."""
    number: int = attention.layer_idx  # type: ignore[assignment]
    return number


# -- masks and caches -----------------------------------------------------------------------------


def has_masks(config: Any) -> bool:
    """Whether transformers knows what masks the kernel of a config takes.

    A kernel that a user has registered without is given what the caller gave, or nothing.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return attention_name(config) in ALL_MASK_ATTENTION_FUNCTIONS


def causal_mask(
    hidden: Tensor,
    valid: Tensor,
    *,
    config: Any,
    length: int,
    offset: int,
    see: Callable[[Any, Any, Any, Any], Any] | None = None,
) -> Any:
    """A causal mask in the form that the kernel of a config takes.

    `ALL_MASK_ATTENTION_FUNCTIONS` and `causal_mask_function` of `masking_utils` are what
    transformers makes its own masks with. `create_causal_mask` above them takes the numbers of
    slots from the first layer of the cache, which is another's where layers hold fewer tokens.

    Args:
        hidden: (B, length, D) states of the queries.
        valid: (B, slots) bool, False at keys that nothing sees.
        config: The decoder's config.
        length: Queries.
        offset: Keys before the first query.
        see: Says of sample, head, query and key whether the query sees the key; None is causal.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    # A kernel of the user's own without masks takes what its arguments are said to be: a 4-D mask.
    make = ALL_MASK_ATTENTION_FUNCTIONS[attention_name(config) if has_masks(config) else "sdpa"]
    return make(
        batch_size=hidden.shape[0],
        q_length=length,
        kv_length=valid.shape[1],
        q_offset=offset,
        kv_offset=0,
        mask_function=see or causal_mask_function,
        attention_mask=valid,
        allow_is_causal_skip=False,
        dtype=hidden.dtype,
        config=config,
        device=hidden.device,
    )


def block_masks(config: Any, embeds: Tensor, tokens: Tensor, cache: Any, blocks: Tensor) -> Any:
    """Masks by kind of layer, in which the tokens of a block see each other.

    `create_masks_for_generate` of `masking_utils` is what models make theirs with; of the public
    method of that name, Gemma 4 Unified has another than its forward goes by.

    Args:
        config: The decoder's config.
        embeds: (B, L, D) embeddings of a prompt.
        tokens: (B, n + L) bool, False at padding, behind n tokens in the cache.
        cache: The cache, or None.
        blocks: (B, n + L) the number of the block of every token, -1 for none.
    """
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate(
        config=config,
        inputs_embeds=embeds,
        attention_mask=tokens,
        position_ids=None,
        block_sequence_ids=blocks,
        **cache_argument(create_masks_for_generate, cache),
    )


def slots_of(cache: Any, length: int, layer: int) -> int:
    """The keys that a layer's kernel gets for `length` new tokens: those in the cache, and theirs.

    `get_mask_sizes` is what transformers sizes masks by; a sliding layer's cache lets go of some,
    a static one has empty slots behind.
    """
    slots: int = cache.get_mask_sizes(length, layer)[0]
    return slots


class CacheOwner(ABC):
    """What goes with a cache, and follows what is done to its rows."""

    @abstractmethod
    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Rows were selected, repeated or reordered."""

    @abstractmethod
    def check_crop(self, count: int) -> None:
        """The last `count` slots are about to go; raises where they must not."""

    @abstractmethod
    def crop(self, count: int) -> None:
        """They are gone."""

    @abstractmethod
    def reset(self) -> None:
        """The cache is empty."""

    @abstractmethod
    def check_use(self) -> None:
        """A model is about to use the cache; raises where it must not."""


class _Owned:
    """Methods of a cache that its owner is told of; comes before the cache's own class."""

    _pore_owner: CacheOwner

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._pore_owner.check_use()
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        self._pore_owner.check_use()  # before layers without keys change their states
        return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._pore_owner.take_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._pore_owner.take_rows(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pore_owner.take_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        count = -int(tokens_to_remove)  # a tensor, in assisted decoding
        if tokens_to_remove > 0:  # until 5.17, the length that is left
            count = max(length - int(tokens_to_remove), 0)
        self._pore_owner.check_crop(count)
        super().crop(-count)  # type: ignore[misc]
        if count:
            self._pore_owner.crop(count)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._pore_owner.reset()


CACHE_METHODS = frozenset(name for name in vars(_Owned) if not name.startswith("_"))


"""The methods of a cache that change what it holds of a sample, or are called before it is used."""


@lru_cache(maxsize=64)
def _owned_class(kind: type) -> type:
    return type(kind.__name__, (_Owned, kind), {"__module__": kind.__module__})


def owned(cache: Any, owner: CacheOwner) -> None:
    """Give a cache an owner, which goes with every copy; it stays what it was to `isinstance`.

    No hook of transformers says when rows of a cache are repeated, selected or cropped.
    """
    cache._pore_owner = owner
    kind: Any = type(cache)
    cache.__class__ = _owned_class(kind)


def owner_of(cache: Any) -> CacheOwner | None:
    """The owner of a cache."""
    found: CacheOwner | None = getattr(cache, "_pore_owner", None)
    return found


def has_static_slots(cache: Any) -> bool:
    """Whether a cache has its slots from the start, for which transformers makes masks early.

    `is_compileable` is what `generate` goes by.
    """
    return bool(getattr(cache, "is_compileable", False))


CHECKPOINT = "_gradient_checkpointing_func"


"""What a layer of transformers calls with its own call, to forget its states until the backward.

It calls the layer once more there, hooks and all, when the forward is long over."""


def checkpointed(layer: nn.Module) -> bool:
    """Whether a layer's next call is made by its `CHECKPOINT`."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def before_checkpoint(
    act: Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None],
    checkpoint: Callable[..., Any],
) -> Callable[..., Any]:
    """A `CHECKPOINT` of a layer that lets a pre-hook act once, and not again in the backward.

    Args:
        act: A forward pre-hook, called with arguments and keyword arguments alone.
        checkpoint: What is called then, with the layer's own call, a partial of the keyword
            arguments, and the arguments.
    """

    def outside(call: Any, *args: Any, **kwargs: Any) -> Any:
        changed = act(args, call.keywords)
        if changed is not None:
            args, keywords = changed
            call = partial(call.func, *call.args, **keywords)
        return checkpoint(call, *args, **kwargs)

    return outside


def sliding_layers(cache: Any) -> list[bool]:
    """Of every layer of a cache whether it lets go of what is out of a window: `is_sliding`."""
    return list(getattr(cache, "is_sliding", ()))


def cached_keys(cache: Any, layer: int) -> Tensor | None:
    """(B, G, n, d) keys that a layer has in the cache; None before it has any.

    `layers[i].keys`; no public function reads what a cache holds. A quantised one has only its
    latest there, and those before in `_quantized_keys`, in another order of the samples since
    beams were reordered (`_pending_beam_idx`, of transformers 5.23).
    """
    layers = getattr(cache, "layers", ())
    if layer >= len(layers):
        return None
    held = layers[layer]
    keys: Tensor | None = getattr(held, "keys", None)
    earlier = getattr(held, "_quantized_keys", None)
    if earlier is None or keys is None:
        return keys
    earlier = held._dequantize(earlier)
    order = getattr(held, "_pending_beam_idx", None)
    if order is not None:
        earlier = earlier.index_select(0, order.to(earlier.device))
    return torch.cat([earlier, keys.to(earlier)], -2)


# -- families -------------------------------------------------------------------------------------


def tiles_of(size: Any, pinpoints: Any, side: int) -> tuple[int, int]:
    """(rows, columns) of the tiles into which LLaVA-NeXT cuts an image of (height, width) pixels.

    `get_anyres_image_grid_shape` is a function of its model file.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
    return rows, columns


def window_order(config: Any, grids: Tensor) -> Tensor:
    """(T,) which visual token comes where in the vision tower of Qwen2.5-VL, window by window.

    `get_vision_window_index` of `vision_utils` is what the tower reorders its patches by.

    Args:
        config: The tower's config.
        grids: (I, 3) frames, height and width of every image in patches.
    """
    from transformers.vision_utils import get_vision_window_index

    order: Tensor = get_vision_window_index(
        grids,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
    )[0]
    return order.to(grids.device)
