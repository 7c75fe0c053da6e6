"""What tessera.MultiheadAttention computes: projections, torch's masks as lengths and biases, attention, weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F

import torch
from torch import Tensor

from ..attention import attention_weights, block_sparse_attention, merge
from ..pattern import BlockPattern, pattern_for
from ..pattern.source import ArgumentError, is_dense
from ._monitored import measured_attention
from ._tracing import may_look
from .monitoring import PerformanceMonitor

_NEG_INF = float("-inf")


class AssertedError(ValueError, AssertionError):
    """A caller's mistake for which torch's own module raises an AssertionError."""


def check_shapes(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int
) -> bool:
    """Whether the input is batched. Words and types of the errors are torch's."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}; allowed: torch.Tensor")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name}: got {type(mask).__name__}; allowed: torch.Tensor or None")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertedError(f"{name}: got {mask.dtype}; only bool and floating types of {name} are supported")
    try:
        return F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, num_heads
        )
    except AssertionError as e:
        raise AssertedError(str(e)) from None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, _NEG_INF)


def _padding(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Key lengths ``[N]`` and bias ``[N, 1, 1, S]`` of a key padding mask ``[N, S]``; padding at the end: no bias."""
    seqlen_k = mask.shape[1]
    if seqlen_k == 0:
        return None, None
    blocked = mask if mask.dtype == torch.bool else mask == _NEG_INF
    at = torch.arange(seqlen_k, device=mask.device)
    if may_look(mask) and not mask.requires_grad:
        lengths = seqlen_k - blocked.sum(1)
        plain = torch.equal(blocked, at >= lengths[:, None])
        if mask.dtype != torch.bool:
            plain = plain and bool(((mask == 0) | blocked).all())
        if plain:
            return lengths, None
    lengths = torch.where(blocked, 0, at + 1).amax(1)
    return lengths, _additive(mask, dtype)[:, None, None, :]


def _bias(mask: Tensor, dtype: torch.dtype, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """An attention mask ``[L, S]`` or ``[N * H, L, S]`` as ``[1 or N, 1 or H, L, S]``."""
    if mask.dim() == 2:
        allowed: tuple[int, ...] = (seqlen_q, seqlen_k)
        wide = mask[None, None]
    else:
        allowed = (batch * heads, seqlen_q, seqlen_k)
    if tuple(mask.shape) != allowed:
        raise ArgumentError(
            f"attn_mask: got shape {tuple(mask.shape)}; The shape of the {mask.dim()}D attn_mask is {mask.shape}, but "
            f"should be {allowed}."
        )
    if mask.dim() == 3:
        wide = mask.unflatten(0, (batch, heads))
    return _additive(wide, dtype)


def _project(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor | None, separate: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v ``[..., E]``: one product for what is the same tensor, views of its result."""
    embed_dim = query.shape[-1]
    weight = packed if packed is not None else separate[0]
    if bias is not None and weight is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    if packed is None:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), separate, biases))  # type: ignore
    if key is value:
        if query is key:
            return F.linear(query, packed, bias).chunk(3, -1)  # type: ignore[return-value]
        w_q, w_kv = packed.split([embed_dim, 2 * embed_dim])
        b_q, b_kv = (None, None) if bias is None else bias.split([embed_dim, 2 * embed_dim])
        return (F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, -1))  # type: ignore[return-value]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), packed.chunk(3), biases))  # type: ignore


def _autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _exact(device: str) -> AbstractContextManager[Any]:
    """Autocast would round the operands of products."""
    return torch.autocast(device, enabled=False) if _autocast_enabled(device) else nullcontext()


def dense_weights(
    q: Tensor, k: Tensor, lse: Tensor, share: Tensor | None, *, scale: float, keep: Tensor | None, bias: Tensor | None,
    key_lengths: Tensor | None, causal: bool, average: bool,
) -> Tensor:  # fmt: skip
    """Weights before dropout, ``[N, L, S]`` averaged over heads or ``[N, H, L, S]``, with gradients: the softmax, in
    fp32 at least, one head at a time. q ``[N, L, H, D]``, k ``[N, S, H, D]``; lse ``[N, H, L]``: -inf where a row sees
    no key; share ``[N, H, L]``: the part of the whole softmax that these keys hold, None: all; keep bool ``[1 or N, 1
    or H, L, S]``.
    """
    seqlen_q, heads, seqlen_k = q.shape[1], q.shape[2], k.shape[1]
    if causal:
        tril = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q)
        keep = tril[None, None] if keep is None else keep & tril
    if key_lengths is not None:
        valid = torch.arange(seqlen_k, device=q.device) < key_lengths[:, None]
        keep = valid[:, None, None] if keep is None else keep & valid[:, None, None]
    empty = (lse == _NEG_INF)[..., None]

    def of(t: Tensor, h: int) -> Tensor:
        return t[:, h if t.shape[1] > 1 else 0]

    def head(h: int) -> Tensor:
        scores = (q[:, :, h].to(lse.dtype) @ k[:, :, h].mT.to(lse.dtype)) * scale
        if bias is not None:
            scores = scores + of(bias, h)
        if keep is not None:
            scores = scores.masked_fill(~of(keep, h), _NEG_INF)
        weights = scores.masked_fill(empty[:, h], 0).softmax(-1)  # of -inf alone it and its gradient would be NaN
        if share is not None:
            weights = weights * share[:, h, :, None]
        return weights.masked_fill(empty[:, h], 0)

    with _exact(q.device.type):
        if not average:
            return torch.stack([head(h) for h in range(heads)], 1).to(q.dtype)
        total = head(0)
        for h in range(1, heads):
            total = total + head(h)
        return (total / heads).to(q.dtype)


def _block_weights(q: Tensor, k: Tensor, pattern: BlockPattern, share: Tensor | None, **options: Any) -> dict[str, Any]:
    """Block form of the weights; share ``[N, H, L]``: the part of the softmax that these keys hold, None: all."""
    w = attention_weights(q, k, pattern, **options)
    return {
        "block_indices": w.block_indices, "block_values": _scale_rows(w.block_indices, w.block_values, share),
        "block_size": w.block_size, "shape": w.shape,
    }  # fmt: skip


def _scale_rows(indices: Tensor, values: Tensor, share: Tensor | None) -> Tensor:
    """Values of blocks ``[n, block_q, block_k]``, each row times its share ``[N, H, L]``."""
    if share is None:
        return values
    block_q = values.shape[1]
    rows = F.pad(share, (0, -share.shape[-1] % block_q)).unflatten(-1, (-1, block_q))
    batch, head, row = indices[:, 0], indices[:, 1], indices[:, 2]
    return values * rows[batch, head, row].unsqueeze(-1)


class Masks(NamedTuple):
    """torch's masks as block_sparse_attention takes them."""

    causal: bool
    bias: Tensor | None  # [1 or N, 1 or H, L, S]
    key_lengths: Tensor | None  # [N]

    def options(self) -> dict[str, Any]:
        return {"causal": self.causal or None, "attn_bias": self.bias, "key_lengths": self.key_lengths}


class Attended(NamedTuple):
    """Attention of one call, and what its weights are made from."""

    out: Tensor  # [N, L, H, D]
    lse: Tensor  # [N, H, L]: over all keys
    part_lse: Tensor  # without bias_k, bias_v and the zero key
    more_lse: Tensor | None  # of those alone
    blocks: BlockPattern | None
    found: dict[str, Any] | None  # weights in block form, of `attend`

    def share(self) -> Tensor | None:
        """[N, H, L]: the part of the whole softmax that the sequence's own keys hold; None: all."""
        return None if self.more_lse is None else (self.part_lse - self.lse).exp().nan_to_num(0.0)


@dataclass(kw_only=True, eq=False)
class MultiheadCall:
    """One call of :class:`tessera.MultiheadAttention`: its parameters and what is asked, handed from the module down.
    :meth:`run` projects, reads the masks, attends and makes the weights; batched input only.

    Attributes:
        in_proj_weight: ``[3 E, E]``, or None and three ``separate_proj_weights``; in_proj_bias: ``[3 E]`` or None.
        pattern: as :func:`pattern_source` returns it; over query and key, without bias_k, bias_v and the zero key,
            which every row sees.
        attend: in place of a pattern: (q, k, v, causal, return_weights, dropout_p, attn_bias=, key_lengths=) -> (out,
            lse, weights in block form or None); need_weights is then False or "blocks".
        norm: applied to the joined heads ``[..., E]``, before the output projection.
        key_lengths: int64 ``[N]``, in place of a key_padding_mask.
        monitor: measures the attention over the pattern.

    Others as the module.
    """

    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    separate_proj_weights: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None
    add_zero_attn: bool = False
    batch_first: bool = False
    pattern: Any = None
    dropout_p: float = 0.0
    key_padding_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False
    need_weights: bool | str = False
    average_attn_weights: bool = True
    attend: Callable[..., tuple[Tensor, Tensor, dict[str, Any] | None]] | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    monitor: PerformanceMonitor | None = None

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | dict[str, Any] | None]:
        """query ``[L, N, E]``, or ``[N, L, E]`` if batch_first; key, value ``[S, N, kdim]``, ``[S, N, vdim]`` likewise.
        Returns (output, weights)."""
        self._check(query, key, value)
        projected = _project(query, key, value, self.in_proj_weight, self.separate_proj_weights, self.in_proj_bias)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        if not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        masks = self._masks(q, k)
        extra = _extra_keys(k, v, self.bias_k, self.bias_v, self.add_zero_attn)
        attended = self._attend(q, k, v, masks, extra)
        out = attended.out if self.batch_first else attended.out.transpose(0, 1)
        out = out.flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        out = F.linear(out, self.out_proj_weight, self.out_proj_bias)
        return out, self._weights(q, k, masks, extra, attended) if self.need_weights else None

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Words and types of the errors are torch's where it has one."""
        embed_dim = self.out_proj_weight.shape[1]
        if query.shape[-1] != embed_dim:
            raise AssertedError(
                f"query: got {query.shape[-1]} features; was expecting embedding dimension of {embed_dim}, "
                f"but got {query.shape[-1]}"
            )
        for name, x, weight in zip(("key", "value"), (key, value), self.separate_proj_weights[1:]):
            features = query.shape[-1] if weight is None else weight.shape[1]
            if x.shape[-1] != features:
                dim = "embed_dim" if weight is None else f"{name[0]}dim"
                raise AssertedError(f"{name}: got {x.shape[-1]} features; allowed: {features}, {dim}")
        dtype = self.out_proj_weight.dtype
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dtype != dtype and not _autocast_enabled(x.device.type):
                raise ArgumentError(f"{name}: got {x.dtype}; allowed: {dtype}, as the parameters (or torch.autocast)")
        for name, mask in (("key_padding_mask", self.key_padding_mask), ("attn_mask", self.attn_mask)):
            if mask is not None and mask.device != query.device:
                raise ArgumentError(f"{name}: got a tensor on {mask.device}; allowed: {query.device}, as query")
        if key.shape[:2] != value.shape[:2] or (self.in_proj_weight is not None and key.shape != value.shape):
            raise AssertedError(
                f"value: got shape {tuple(value.shape)}; key shape {key.shape} does not match value shape {value.shape}"
            )
        batch_dim = 0 if self.batch_first else 1
        if query.shape[batch_dim] != key.shape[batch_dim]:
            raise ArgumentError(
                f"key: got a batch of {key.shape[batch_dim]}; allowed: {query.shape[batch_dim]}, the batch of query"
            )

    def _masks(self, q: Tensor, k: Tensor) -> Masks:
        """torch's masks. The hint is_causal replaces the mask where torch lets it; without a mask it is what is asked
        for."""
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        causal, attn_mask = self.is_causal, self.attn_mask
        if self.is_causal and attn_mask is not None:
            if self.key_padding_mask is None and not self.need_weights and seqlen_q == seqlen_k:
                attn_mask = None
            else:
                causal = False
        bias = None
        if attn_mask is not None:
            bias = _bias(attn_mask, q.dtype, batch, self.num_heads, seqlen_q, seqlen_k)
        if self.key_padding_mask is None:
            return Masks(causal, bias, self.key_lengths)
        if tuple(self.key_padding_mask.shape) != (batch, seqlen_k):
            raise AssertedError(
                f"key_padding_mask: got shape {tuple(self.key_padding_mask.shape)}; Expected key_padding_mask.shape to "
                f"be {(batch, seqlen_k)}"
            )
        key_lengths, padding = _padding(self.key_padding_mask, q.dtype)
        if padding is not None:
            bias = padding if bias is None else bias + padding
        return Masks(causal, bias, key_lengths)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, extra: tuple[Tensor, Tensor] | None) -> Attended:
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        dropout = 0.0 if self.dropout_p == 1 else self.dropout_p  # 1 drops everything, which no 1 / (1 - p) makes good
        blocks: BlockPattern | None = None
        found: dict[str, Any] | None = None
        if self.attend is not None:
            # A mask that is known to be causal must not change which pattern is made.
            known = masks.causal or (self.is_causal and seqlen_q == seqlen_k)
            out, part_lse, found = self.attend(
                q, k, v, known, bool(self.need_weights), dropout, attn_bias=masks.bias, key_lengths=masks.key_lengths
            )
        else:
            blocks = pattern_for(self.pattern, seqlen_q, seqlen_k, self.is_causal, self.num_heads)
            attention: Callable[..., Any] = block_sparse_attention
            if self.monitor is not None and may_look(q):
                attention = partial(measured_attention, self.monitor)
            out, part_lse = attention(q, k, v, blocks, dropout_p=dropout, return_lse=True, **masks.options())
        lse, more_lse = part_lse, None
        if extra is not None:
            every = pattern_for(None, seqlen_q, extra[0].shape[1], False, self.num_heads)
            more, more_lse = block_sparse_attention(q, *extra, every, dropout_p=dropout, return_lse=True)
            out, lse = merge(out, part_lse, more, more_lse)
        if self.dropout_p == 1:
            out = out * 0
        return Attended(out, lse, part_lse, more_lse, blocks, found)

    def _weights(
        self, q: Tensor, k: Tensor, masks: Masks, extra: tuple[Tensor, Tensor] | None, attended: Attended
    ) -> Tensor | dict[str, Any]:
        share = attended.share()
        if self.need_weights == "blocks":
            if attended.found is not None:
                found = attended.found
                return {**found, "block_values": _scale_rows(found["block_indices"], found["block_values"], share)}
            assert attended.blocks is not None
            return _block_weights(q, k, attended.blocks, share, **masks.options())
        keep = None
        if not is_dense(self.pattern):
            assert attended.blocks is not None
            keep = attended.blocks.to_token_mask().to(q.device)
        scale, average = 1 / math.sqrt(q.shape[-1]), self.average_attn_weights
        weights = dense_weights(
            q, k, attended.part_lse, share, scale=scale, keep=keep, bias=masks.bias, key_lengths=masks.key_lengths,
            causal=masks.causal, average=average,
        )  # fmt: skip
        if extra is None or attended.more_lse is None:
            return weights
        last = dense_weights(
            q, extra[0], attended.more_lse, (attended.more_lse - attended.lse).exp(), scale=scale, keep=None, bias=None,
            key_lengths=None, causal=False, average=average,
        )  # fmt: skip
        return torch.cat([weights, last], -1)


def _extra_keys(
    k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool
) -> tuple[Tensor, Tensor] | None:
    """Keys and values ``[N, 1 or 2, H, D]`` that every row sees beside the sequence's: bias_k, bias_v, zeros."""
    if bias_k is None and not add_zero_attn:
        return None
    batch, heads, dim = k.shape[0], k.shape[2], k.shape[3]
    pairs = []
    if bias_k is not None and bias_v is not None:
        pairs.append(tuple(b.to(k.dtype).view(1, 1, heads, dim).expand(batch, -1, -1, -1) for b in (bias_k, bias_v)))
    if add_zero_attn:
        pairs.append((k.new_zeros(batch, 1, heads, dim), v.new_zeros(batch, 1, heads, dim)))
    return torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)
