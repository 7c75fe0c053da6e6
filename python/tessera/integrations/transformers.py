"""Hugging Face transformers (5.0 and later), in two lines::

    tessera.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="tessera")

or, for a model that exists already, ``model.set_attn_implementation("tessera")``. With a dense pattern (the default) a
model computes what it computes with "sdpa". With a sparse one (``register(pattern="dilated_sparse", density=0.1)``)
every full-attention layer attends over the kept blocks only; layers with a sliding window of their own keep that
window.

Models whose attention does not go through transformers' ``AttentionInterface`` (Bloom, OpenAI-GPT, XLNet, ...) would
never call it: they are a ValueError when they are made with such a name.

A pattern belongs to positions of the sequence: a token sees the same blocks in prefill, in chunks of it and in
decoding. Padding on the left counts as positions.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.nn.attention.flex_attention import BlockMask, create_mask

import torch
from torch import Tensor, nn

from .. import patterns
from ..attention import block_sparse_attention
from ..pattern import BlockPattern, Request
from ..pattern.checks import check_int, suggestion
from ..pattern.mask_mod import pattern_of_mask_mod
from ._versions import check_version

Window = tuple[int | None, int | None]  # tokens that a query sees before and after it; None: no limit


def register(
    name: str = "tessera",
    pattern: str | Any | Callable[[int, bool], BlockPattern] = "dense",
    *,
    density: float | None = None,
    block: int | tuple[int, int] | None = None,
    dense_layers: Collection[int] = (),
    layers: Mapping[int, str | Any | Callable[..., BlockPattern]] | None = None,
    **options: Any,
) -> None:
    """Makes ``attn_implementation=name`` mean Tessera, in all models; attention and its masks. May be called again,
    also with other names for other patterns.

    Args:
        pattern: the name of a pattern of :mod:`tessera.patterns`; a ``PatternConfig``; or a function
            ``(seqlen, causal) -> BlockPattern`` of ``(seqlen, seqlen)``, called once a forward pass, or
            ``(seqlen, causal, layer_idx)``, called once for each layer of it. While a cache grows, causal lengths are
            rounded up to whole blocks.
        density, options: of the named pattern. A density is shared out in proportion to each row (``budget``): then a
            token sees the same blocks in prefill, in its chunks and in decoding, whatever the length; with
            ``seqlen_total``, the length that the model is used at, evenly: the same number of blocks for every token.
        block: of the named pattern (default 128); with a function, that of its patterns.
        dense_layers: ``layer_idx`` of layers that stay dense.
        layers: patterns of single layers in place of ``pattern``, by ``layer_idx``: a name (with the options here;
            "dense" with none), a ``PatternConfig`` or a function.

    With a sparse pattern, a line of the logger ``tessera`` says after the first pass of a model which layers became
    sparse and why others did not.

    Raises:
        ImportError: transformers is missing or older than 5. ValueError, TypeError: the pattern cannot be made; the
        name is somebody else's ("sdpa", "eager", ...). Later, ValueError: a model is made with this name that would not
        call it, or not as it has to be called.
    """
    import transformers

    check_version("transformers", transformers.__version__)
    _check_name(name)
    choice = _Choice(pattern, density, block, dense_layers, dict(options))
    choice.name = name
    choice.set_layers(layers, density, block, options)

    @torch.compiler.disable(reason="tessera: patterns and masks of a model follow values; called between graphs")
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        return _attend(choice, module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, _make_mask_eagerly)
    _names.add(name)
    _refuse_models_that_would_not_call()


def unregister(name: str = "tessera") -> None:
    """Takes a name back. ValueError: it is not one that :func:`register` gave. A model that still says it raises when
    it is called."""
    import transformers

    if name not in _names:
        raise ValueError(f"name: got {name!r}; allowed: {', '.join(map(repr, sorted(_names))) or 'none is registered'}")
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop(name, None)
    _names.discard(name)


_names: set[str] = set()
# Configurations of models that look into their masks: these get real ones.
_look_into_masks: set[type] = set()


def _check_name(name: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}; allowed: what attn_implementation shall say, a str")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):  # "/", "|", "@" and ":" mean kernels of a hub
        raise ValueError(f"name: got {name!r}; allowed: letters, digits, '_', '.' and '-'")
    taken = {"eager", *AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping} - _names
    if name in taken:
        raise ValueError(f"name: got {name!r}, which transformers or another package has; allowed: one that is free")


def _refuse_models_that_would_not_call() -> None:
    """transformers takes any registered name for any model, and one that does not look it up stays as it was, in
    silence. It asks this method of every model that is made, and of each of its parts."""
    from transformers import PreTrainedModel

    ask = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if ask is None or hasattr(ask, "__wrapped__"):  # of another version; or since an earlier call
        return

    @functools.wraps(ask)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention in _names:
            if why := _would_not_call(type(self)):
                raise ValueError(
                    f"attn_implementation: got {requested_attention!r} for {type(self).__name__}, {why}; allowed: "
                    '"eager", or for parts of a model that take it a dict such as '
                    f"{{'text_config': {requested_attention!r}}}"
                )
            if any(_LOOKS_INTO_MASKS.search(source) for source in _sources(type(self))):
                _look_into_masks.add(type(self.config))
        return ask(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = checked


# A model that asks for a BlockMask, to leave its own masking out where it is one.
_LOOKS_INTO_MASKS = re.compile(r"isinstance\(\w*mask\w*, \(?[\w., ]*BlockMask")
# A class for each implementation, looked up in a table of the model's own.
_OWN_TABLE = re.compile(r"_CLASSES\[\s*(?:self\.)?(?:config\._)?attn_implementation\b")


def _sources(model: type) -> list[str]:
    """The files of a model and of the models that it is derived from."""
    from transformers import PreTrainedModel

    found = []
    for ancestor in model.__mro__[: model.__mro__.index(PreTrainedModel)]:
        try:
            found.append(inspect.getsource(sys.modules[ancestor.__module__]))
        except (KeyError, OSError, TypeError):
            found.append("AttentionInterface")  # cannot be read: counts as if it looked attention up
    return found


def _would_not_call(model: type) -> str | None:
    """Why a model would not call what is registered, or not as it would have to; None: it does."""
    from transformers import PreTrainedModel

    for ancestor in model.__mro__[: model.__mro__.index(PreTrainedModel)]:
        if "_supports_attention_backend" in vars(ancestor):
            if vars(ancestor)["_supports_attention_backend"] is False:
                return "which says that it takes no registered attention (_supports_attention_backend is False)"
            break
    if not any(getattr(model, f"_supports_{name}", True) for name in ("sdpa", "flash_attn", "flex_attn")):
        return "which says that it takes no attention but its own"
    own = False
    for source in _sources(model):
        if _OWN_TABLE.search(source):
            return "which has a table of its own for attention"
        if "ALL_ATTENTION_FUNCTIONS" in source or "AttentionInterface" in source:
            return None
        own = own or re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE) is not None
    return "whose attention does not go through AttentionInterface" if own else None


class _Choice:
    """Which pattern a registered name stands for."""

    def __init__(self, pattern: Any, density: float | None, block: Any, dense_layers: Collection[int], options: dict):
        if isinstance(dense_layers, str) or not isinstance(dense_layers, Collection):
            raise TypeError(f"dense_layers: got {type(dense_layers).__name__}; allowed: a collection of layer_idx")
        self.dense_layers = frozenset(check_int("dense_layers", i, 0) for i in dense_layers)
        self.block: Any = 128 if block is None else block
        self.function: Callable[[int, bool], BlockPattern] | None = None
        self.named: patterns.Named | None = None
        self.total: int | None = None
        self.name = ""
        self.layers: dict[int, _Choice] = {}  # of layers that have one of their own
        self.by_layer = False  # `function` takes layer_idx as well
        self.noted: dict[tuple[int, int | None], str] | None = {}
        for option in ("seqlen_q", "seqlen_k", "causal", "cached"):
            if option in options:
                raise TypeError(f"{option}: got {options[option]!r}; allowed: nothing, each call decides it")
        if hasattr(pattern, "spec"):  # PatternConfig
            for option, value in {"density": density, "block": block, **options}.items():
                if value is not None:
                    raise TypeError(f"{option}: got it beside a PatternConfig; allowed: inside the config")
            pattern, self.block, options = pattern.spec()
        elif density is not None:
            options = {"density": density, **options}
        if callable(pattern):
            if options:
                raise TypeError(f"{next(iter(options))}: got it beside a function; allowed: with the name of a pattern")
            self.function = pattern
            self.by_layer = _takes_layer(pattern)
        elif not isinstance(pattern, str):
            raise TypeError(
                f"pattern: got {type(pattern).__name__}; allowed: the name of a pattern, a PatternConfig, or a "
                "function (seqlen, causal) -> BlockPattern"
            )
        elif pattern not in patterns.NAMES:
            near = suggestion(pattern, patterns.NAMES)
            raise ValueError(f"pattern: got {pattern!r}; allowed: {', '.join(patterns.NAMES)}{near}")
        elif pattern not in ("dense", "causal") or options:
            if pattern == "causal":
                raise TypeError(f"{next(iter(options))}: got it with the pattern causal; allowed: none of its options")
            total = options.pop("seqlen_total", None)
            self.total = None if total is None else check_int("seqlen_total", total, 1)
            options.setdefault("budget", "proportional" if total is None else "even")
            self.named = patterns.Named(pattern, block=self.block, **options)
            self.pattern_for(Request(256, 256, True))  # wrong options are told now
        else:
            patterns.dense(256, block=self.block)

    def pattern_for(self, request: Request) -> BlockPattern:
        """The pattern of a whole sequence."""
        if self.named is not None:
            if self.total and request.causal:
                request = request._replace(q_offset=0, seqlen_total=max(self.total, request.seqlen_q))
            return self.named.pattern_for(request)
        assert self.function is not None
        made: Any = self.function(request.seqlen_q, request.causal)
        if not isinstance(made, BlockPattern):
            raise TypeError(f"pattern: got {type(made).__name__} from the function; allowed: tessera.BlockPattern")
        if made.shape != request[:2]:
            raise ValueError(f"pattern: got lengths {made.shape} from the function; allowed: {request[:2]}")
        return made

    def set_layers(self, layers: Any, density: float | None, block: Any, options: dict) -> None:
        if layers is None:
            return
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers: got {type(layers).__name__}; allowed: a dict from layer_idx to patterns")
        for index, pattern in layers.items():
            index = check_int("layers", index, 0)
            named = isinstance(pattern, str) and pattern not in ("dense", "causal")
            try:
                sized = block if isinstance(pattern, str) or callable(pattern) else None  # a config has its own
                of_name = (density, options) if named else (None, {})
                self.layers[index] = _Choice(pattern, of_name[0], sized, (), dict(of_name[1]))
            except (TypeError, ValueError) as error:
                raise type(error)(f"layers[{index}]: {error}") from None

    def of(self, module: nn.Module) -> _Choice:
        """That of the layer."""
        index = getattr(module, "layer_idx", None)
        if self.by_layer or self.layers:
            if index is None:
                name = "layers" if self.layers else "pattern"
                raise ValueError(
                    f"{name}: got {type(module).__name__}, which has no layer_idx; allowed: one for all layers"
                )
            if index not in self.layers and self.by_layer:
                own = self.layers[index] = copy.copy(self)
                function: Any = self.function
                own.function = lambda seqlen, causal: function(seqlen, causal, index)
                own.by_layer, own.layers = False, {}
        return self.layers.get(index, self) if index is not None else self

    def sparse(self, module: nn.Module) -> bool:
        if self.named is None and self.function is None:
            return False
        if not self.dense_layers:
            return True
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise ValueError(f"dense_layers: got {type(module).__name__}, which has no layer_idx; allowed: ()")
        return index not in self.dense_layers

    def note(self, module: nn.Module, sparse: bool, local: bool) -> None:
        """Says once, when a layer comes for the second time, what each layer became."""
        if self.noted is None or self.named is None and self.function is None and not self.layers:
            return
        index = getattr(module, "layer_idx", None)
        if (id(module), index) not in self.noted:
            why = "sparse" if sparse else "a window of its own" if local else "dense, as registered"
            self.noted[id(module), index] = why
            return
        found: dict[str, list[str]] = {}
        for (_, at), why in self.noted.items():
            found.setdefault(why, []).append("?" if at is None else str(at))
        self.noted = None
        parts = [f"{why}: layer{'s' * (len(layers) > 1)} {', '.join(layers)}" for why, layers in found.items()]
        of = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        logging.getLogger("tessera").warning("%s in %s: %s", self.name, of, "; ".join(parts))


def _takes_layer(function: Callable) -> bool:
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given) == 3


class AttentionPlan(BlockMask):
    """What the mask of a forward pass says, in place of a mask of ``q_length x kv_length``. One object serves all
    layers, and keeps what it made for them.

    It is a ``BlockMask`` in name only: transformers hands objects of that type through untouched. A model that computes
    with it meets a tensor: the additive mask of that size, made when it is first asked for.
    """

    def __init__(
        self, batch_size: int, q_length: int, kv_length: int, q_offset: int, kv_offset: int, dtype: Any = torch.float32
    ) -> None:
        self.dtype: torch.dtype = dtype
        self.batch_size, self.q_length = batch_size, q_length
        self.kv_length = kv_length  # keys that the cache hands over, of which those past the queries are cut off
        self.q_offset, self.kv_offset = q_offset, kv_offset  # positions of the first query and key
        self.causal = True
        self.opaque = False  # a mask that says causality itself; `causal` is then False
        self.window: Window = (None, None)
        self.local = False  # a layer that sees a window or chunk only
        self.mask_function: Callable | None = None  # what is neither causal nor a window, asked pair by pair
        self.device: torch.device | str = "cpu"
        self.key_lengths: Tensor | None = None
        self.key_bias: Tensor | None = None  # fp32 [B, 1, 1, kv_length]: 0, or -inf for padding
        self._made: dict[Any, BlockPattern] = {}
        self._tensor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch_size, 1, self.q_length, self.kv_length)

    @property
    def ndim(self) -> int:
        """What GPT-2 asks before it reshapes a mask of the caller's."""
        return 4

    def __repr__(self) -> str:
        return f"AttentionPlan({self.shape}, causal={self.causal}, window={self.window}, q_offset={self.q_offset})"

    __str__ = __repr__

    def to(self, device: Any) -> AttentionPlan:
        return self

    def contiguous(self) -> AttentionPlan:
        """What generate() asks masks of compilable caches for."""
        return self

    def tensor(self) -> Tensor:
        """The additive mask ``[B, 1, q_length, kv_length]`` in ``dtype``: 0, or the least number where a pair is not
        admitted; as models that look into their masks expect it."""
        if self._tensor is None:
            q = torch.arange(self.q_length)[:, None] + self.q_offset
            k = torch.arange(self.kv_length)[None] + self.kv_offset
            if self.mask_function is not None:
                kept = create_mask(
                    lambda b, h, i, j: self.mask_function(b, h, i + self.q_offset, j + self.kv_offset),
                    self.batch_size, 1, self.q_length, self.kv_length, device=self.device,
                )  # fmt: skip
            else:
                kept = k <= q if self.causal else torch.ones(q.shape[0], k.shape[1], dtype=torch.bool)
                left, right = self.window
                kept = kept if left is None else kept & (k >= q - left)
                kept = kept if right is None else kept & (k <= q + right)
                kept = kept.expand(self.batch_size, 1, -1, -1)
            if self.key_lengths is not None:
                kept = kept & (torch.arange(self.kv_length) < self.key_lengths[:, None])[:, None, None, :]
            if self.key_bias is not None:
                kept = kept & (self.key_bias == 0)
            least = torch.finfo(self.dtype).min
            self._tensor = torch.zeros(kept.shape, dtype=self.dtype, device=kept.device).masked_fill_(~kept, least)
        return self._tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"AttentionPlan has no attribute {name!r}")
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    def set_padding(self, kept: Tensor) -> None:
        """kept: bool ``[B, kv_length]``."""
        if bool(kept[:, : self.keys].all()):
            return
        lengths = kept.sum(-1)
        if bool((kept == (torch.arange(kept.shape[1], device=kept.device) < lengths[:, None])).all()):
            self.key_lengths = lengths.clamp(max=self.keys)
        else:
            bias = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device).masked_fill_(~kept, float("-inf"))
            self.key_bias = bias[:, None, None, :]

    @property
    def keys(self) -> int:
        """Keys that take part: with causality those up to the last query."""
        last = self.q_offset + self.q_length - self.kv_offset
        return max(0, min(self.kv_length, last)) if self.causal else self.kv_length

    def pattern(self, choice: _Choice, module: nn.Module) -> BlockPattern:
        """The pattern of a layer."""
        sparse = choice.sparse(module) and not self.local
        causal = self.causal or self.opaque and bool(getattr(module, "is_causal", False))
        key = (choice, sparse, causal)
        if key not in self._made:
            made = self._sparse(choice, causal) if sparse else self._dense(choice)
            # A mask of the caller's says causality itself; the pattern says which blocks only.
            self._made[key] = made.blocks_only() if made.causal and not self.causal else made
        return self._made[key]

    def pairs(self, block: tuple[int, int]) -> BlockPattern:
        """The mask function's pairs, as bitmaps of partial blocks of this size."""
        if block not in self._made:
            self._made[block] = _ask(self, block)
        return self._made[block]

    def _dense(self, choice: _Choice) -> BlockPattern:
        if self.mask_function is not None:
            return self.pairs(_MASK_BLOCK)
        aligned = self.causal and self.q_offset - self.kv_offset == self.keys - self.q_length
        return patterns.cache.get("dense", self.q_length, self.keys, block=choice.block, causal=aligned)

    def _sparse(self, choice: _Choice, causal: bool) -> BlockPattern:
        start, end = self.q_offset, self.keys
        if self.kv_offset or start + self.q_length != end:
            raise ValueError(
                f"pattern: got queries {start}..{start + self.q_length} on keys {self.kv_offset}.."
                f"{self.kv_offset + end}; allowed with a sparse pattern: queries that are the last of the keys"
            )
        if start == 0:
            made = choice.pattern_for(Request(end, end, causal))
            return made if self.mask_function is None else made & self.pairs(made.block)
        # Rows of the pattern over all positions; the last one may not be full yet.
        block_q = choice.block[0] if isinstance(choice.block, (tuple, list)) else choice.block
        if self.mask_function is not None:
            raise ValueError("mask: got neither causal nor a window, with a cache; allowed: a dense pattern")
        rounded = -(-end // block_q) * block_q
        rows = choice.pattern_for(Request(rounded, rounded, causal)).for_queries(start, end)
        return rows if rows.seqlen_k == end else rows.with_keys(end)


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(self.tensor(), name)(
        *pytree.tree_map_only(AttentionPlan, lambda p: p.tensor(), others)
    )


for (
    _name
) in "add radd sub rsub mul rmul truediv rtruediv and rand or ror xor rxor invert neg eq ne lt le gt ge len".split():
    setattr(AttentionPlan, f"__{_name}__", _operator(f"__{_name}__"))
setattr(AttentionPlan, "__hash__", object.__hash__)  # noqa: B010  (== makes tensors)


# A mask that is no formula, without a sparse pattern that says a size; as big as the default of patterns.
_MASK_BLOCK = (128, 128)


def make_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> AttentionPlan | Tensor:
    """What transformers calls to make a mask (``AttentionMaskInterface``). Causal and window masks become numbers,
    padding key lengths or a bias of one row; any other mask_function is asked row of blocks by row of blocks, and kept
    as bitmaps of partial blocks. Nothing of q_length x kv_length is made. The first versions of transformers 5 say
    cache_position, the positions of the queries, in place of their number and offset."""
    from transformers import masking_utils

    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    plan = AttentionPlan(batch_size, q_length, kv_length, int(q_offset), int(kv_offset), dtype)
    plan.local = local_size is not None
    try:
        known = _read(_without_packing(mask_function))
    except KeyError:  # a version that captures it under another name
        known = None
    if known is not None:
        plan.causal, plan.window = known
    else:
        plan.causal, plan.opaque = False, True
        plan.mask_function, plan.device = mask_function, device
    if attention_mask is not None:  # as long as what was seen so far: keys beyond it are padding
        kept = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        plan.set_padding(F.pad(kept, (0, kv_length - kept.shape[1])))
    return plan.tensor() if type(config) in _look_into_masks else plan


def _read(mask_function: Callable) -> tuple[bool, Window] | None:
    """(causal, window) of the masks that transformers makes for ordinary and sliding layers; None for any other."""
    from transformers import masking_utils as m

    if mask_function is m.causal_mask_function:
        return True, (None, None)
    if mask_function is m.bidirectional_mask_function:
        return False, (None, None)
    if not _made_by(mask_function, "and_masks"):
        return None
    parts = _captured(mask_function, "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    if parts[1] is m.causal_mask_function and _made_by(parts[0], "sliding_window_overlay"):
        return True, (_captured(parts[0], "sliding_window") - 1, None)
    if parts[1] is m.bidirectional_mask_function and _made_by(parts[0], "sliding_window_bidirectional_overlay"):
        width = _captured(parts[0], "sliding_window")
        return False, (width, width)
    return None


# Tracing would take the mask functions apart, which _read has to recognise.
_make_mask_eagerly = torch.compiler.disable(
    make_mask, reason="tessera: patterns and masks of a model follow values; called between graphs"
)


def _without_packing(mask_function: Callable) -> Callable:
    """The mask function beneath that of packed sequences where all of a row is one sequence: under torch.compile
    transformers cannot look, and says packed for every batch without a mask."""
    parts = _captured(mask_function, "mask_functions") if _made_by(mask_function, "and_masks") else ()
    packed = [part for part in parts if _made_by(part, "packed_sequence_mask_function")]
    others = [part for part in parts if part not in packed]
    if len(packed) != 1 or len(others) != 1 or bool(_captured(packed[0], "packed_sequence_mask")[:, -1].any()):
        return mask_function
    if _made_by(others[0], "remap_positions_for_packed_sequence"):  # since 5.21
        return _captured(others[0], "mask_function")
    return others[0]


def _made_by(function: Any, maker: str) -> bool:
    """Whether a closure is one that the function of this name in transformers returns. Versions differ in what they
    have; a mask of a form that is not known here is asked pair by pair."""
    from transformers import masking_utils

    code, known = getattr(function, "__code__", None), getattr(masking_utils, maker, None)
    return code is not None and known is not None and code in known.__code__.co_consts


def _captured(function: Any, name: str) -> Any:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))[name]


def _ask(plan: AttentionPlan, block: tuple[int, int]) -> BlockPattern:
    mask_function = plan.mask_function
    assert mask_function is not None

    def pair(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_function(b, h, q + plan.q_offset, k + plan.kv_offset)

    return pattern_of_mask_mod(
        pair, batches=plan.batch_size, seqlen_q=plan.q_length, seqlen_k=plan.kv_length, block=block, device=plan.device
    )


# What models hand to attention beside what it computes with: known to change nothing, here as with sdpa. (Where packed
# sequences are said by cu_seq_lens, the mask says them too, or the model cuts them apart.)
_HARMLESS = {
    "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch", "cu_seq_lens_q",
    "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "seq_idx", "use_cache", "cache_position",
    "deterministic", "return_dict", "logits_to_keep", "decoder_input_ids", "labels", "token_type_ids",
    "mm_token_type_ids",
}  # fmt: skip


def _attend(
    choice: _Choice,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionPlan | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a model calls (``AttentionInterface``). query ``[B, H, Sq, D]``, key, value ``[B, Hkv, Sk, D]``; returns
    ``[B, Sq, H, Dv]``."""
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions: got True; allowed: False (weights need attn_implementation="eager")')
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise ValueError(
                f"{name}: got {type(given).__name__} from {type(module).__name__}; allowed: None with this attention, "
                "which would leave it out"
            )
    query, key, value = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (query, key, value))
    plan, bias = _plan_of(mask, module, query, key, is_causal, sliding_window)
    if position_bias is not None:
        if position_bias.shape[-1] > plan.keys:
            position_bias = position_bias[..., : plan.keys]
        bias = position_bias if bias is None else bias + position_bias
    own = choice.of(module)
    pattern = plan.pattern(own, module)
    choice.note(module, own.sparse(module) and not plan.local, plan.local)
    if plan.keys != key.shape[2]:
        key, value = key[:, :, : plan.keys], value[:, :, : plan.keys]
    out = block_sparse_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        pattern,
        causal=plan.causal or None,
        scale=scaling,
        attn_bias=bias,
        key_lengths=plan.key_lengths,
        window=None if plan.window == (None, None) else plan.window,
        dropout_p=dropout,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
        q_offset=plan.q_offset - plan.kv_offset,
    )
    assert isinstance(out, Tensor)
    return out, None


def _plan_of(
    mask: Any, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, sliding_window: int | None
) -> tuple[AttentionPlan, Tensor | None]:
    """The plan of a call and its additive bias, also where a model or caller brings a mask of its own, or none."""
    if isinstance(mask, AttentionPlan) and (
        mask.kv_length == 1 != key.shape[2] or mask.q_length == 1 != query.shape[2]
    ):
        mask = mask.tensor()  # of one query or key, for all of them: cross-attention, generation by an encoder
    if isinstance(mask, AttentionPlan):
        if mask.q_length != query.shape[2] or mask.kv_length != key.shape[2]:
            raise ValueError(
                f"attention_mask: got one of {mask.q_length} x {mask.kv_length}; allowed: {query.shape[2]} x "
                f"{key.shape[2]}, queries x keys"
            )
        bias = mask.key_bias
        return mask, None if bias is None else bias[..., : mask.keys]
    plan = AttentionPlan(query.shape[0], query.shape[2], key.shape[2], key.shape[2] - query.shape[2], 0)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None:
        plan.causal = bool(causal)
        plan.local = sliding_window is not None
        if plan.causal and sliding_window is not None:
            plan.window = (sliding_window - 1, None)
        if not plan.causal:
            plan.q_offset = 0
        return plan, None
    if not isinstance(mask, Tensor) or not 1 <= mask.dim() <= 4:
        what = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {what}; allowed: a tensor that broadcasts to [B, H, Sq, Sk], or what transformers "
            "made for tessera"
        )
    mask = mask[(None,) * (4 - mask.dim())]
    # A mask of the caller's says everything, causality included.
    plan.causal, plan.opaque = False, True
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, float("-inf"))
    return plan, mask
