"""MultiheadAttention: parameters and configuration only; what it computes is in _multihead.py."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..pattern import BlockPattern, PatternConfig, PatternSource
from ..pattern.source import ArgumentError, is_dense, pattern_source
from ._monitored import Monitored
from ._multihead import AssertedError, MultiheadCall, check_shapes
from ._tracing import may_look

_TorchAttention = nn.MultiheadAttention  # also where a program has put ours in its place


class MultiheadAttention(Monitored, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` over a block pattern: the same arguments, defaults, parameters (names, shapes,
    initialisation from the same seed) and results, each row's softmax being over the keys that pattern and masks admit.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch.
        pattern: None (dense); a :class:`~tessera.BlockPattern` (fixed lengths; heads 1 or num_heads); a callable
            ``(seqlen_q, seqlen_k) -> BlockPattern``, asked at every call; a :class:`~tessera.PatternConfig`, a dict of
            its fields, or the name of a pattern (made for the lengths that come, and cached).

    What is not as in torch:

    - A row that sees no key gives 0 before the output projection, and weights 0; torch gives NaN (also in inference
      inside of its layers, where those compute dense attention by themselves; see below).
    - ``is_causal=True`` without ``attn_mask`` is causal attention (aligned bottom right); torch refuses it. Named
      patterns then keep their density among the pairs that causality admits.
    - ``need_weights`` is, unless given, True where attention is dense, as in torch, and False where there is a pattern:
      dense weights of 16,384 tokens take 13 GB. True makes dense weights ``[N, L, S]``, with gradients, before dropout
      (torch: after it). ``need_weights="blocks"`` returns the kept blocks only: a dict with ``block_indices`` (int64
      ``[blocks, 4]``: batch, head, block row, block column), ``block_values`` (fp32 ``[blocks, block_q, block_k]``),
      ``block_size`` and ``shape``; no gradients.
    - Nested tensors of ``torch.jagged`` layout work wherever others do (``batch_first``, no masks); strided ones too
      with a pattern, and as torch takes them without. Patterns are then of the longest sequence; a BlockPattern may be
      of more tokens.
    - No detour in eval mode: with a pattern, ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder``, which read
      the projection weights to compute dense attention by themselves, are told not to (``_qkv_same_embed_dim`` is
      False, ``merge_masks`` refuses). With None or ``"dense"`` dense is what is asked for, so torch's inference
      operators are taken where torch would: by those layers, and here for dense weights and strided nested tensors
      (``torch.backends.mha.set_fastpath_enabled(False)`` is torch's switch for them all).
    - ``torch.jit.script`` takes dense attention only, and puts torch's own module in its place; ``torch.jit.trace``
      (under no_grad) makes a graph for the traced lengths. To ``torch.fx.symbolic_trace`` it is no leaf, and cannot be
      traced through.
      ``torch.compile`` and ``torch.export`` take it with lengths that vary.
    - No derivatives of derivatives, and no forward-mode ones (torch has them with ``need_weights=True``).
    - ``is_causal=True`` beside ``add_bias_kv`` or ``add_zero_attn``: every row sees those keys (torch loses them where
      ``need_weights=False``).

    ``performance_monitor`` and ``get_performance_stats()`` are those of :class:`~tessera.PerformanceMonitor`.

    Raises:
        ValueError (also an AssertionError and a RuntimeError, as torch raises): shapes, mask dtypes, a pattern of other
            lengths. TypeError: what is not a tensor or pattern.

    Example:
        >>> attention = tessera.MultiheadAttention(64, 4, pattern="local_window", batch_first=True)
        >>> x = torch.randn(2, 300, 64)
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights
        (torch.Size([2, 300, 64]), None)
    """

    _pattern: Any = None  # what unpickled torch modules have

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: PatternSource = None,
    ) -> None:
        source = pattern_source(pattern)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout}; allowed: 0 <= dropout <= 1")
        try:
            super().__init__(
                embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
            )
        except AssertionError as e:
            raise AssertedError(f"num_heads: got {num_heads} for embed_dim {embed_dim}; {e}") from None
        self.pattern = source

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, pattern: PatternSource = None) -> MultiheadAttention:
        """A module that shares the parameters, mode and hooks of ``module``: what swaps attention in a model."""
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module: got {type(module).__name__}; allowed: torch.nn.MultiheadAttention")
        if nn.utils.parametrize.is_parametrized(module):  # its class is one of its own, which computes the parameters
            names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
            raise ValueError(
                f"module: got one whose {names} is parametrized; allowed: a module without parametrizations of its own "
                "(torch.nn.utils.parametrize.remove_parametrizations, or register them on the new module)"
            )
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        state = {name: dict(x) if isinstance(x, dict) else x for name, x in module.__dict__.items()}
        new.__dict__.update(state)
        new.pattern = pattern
        return new

    @property
    def pattern(self) -> Any:
        """None, a BlockPattern, a callable or a PatternConfig. May be assigned, to all that the constructor takes."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: PatternSource) -> None:
        self._pattern = pattern_source(pattern)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # torch.nn.TransformerEncoder and its layer ask this before they compute dense attention from the weights. Asked
        # anew, because a config may be changed after it was given.
        return self.kdim == self.vdim == self.embed_dim and is_dense(self._pattern)

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        """torch's constructor says what kdim and vdim say."""

    def _reset_parameters(self) -> None:
        pattern, self._pattern = self._pattern, None  # torch asks the property above which parameters there are
        try:
            super()._reset_parameters()
        finally:
            self._pattern = pattern

    def __prepare_scriptable__(self) -> nn.Module:
        if not is_dense(self._pattern):
            raise RuntimeError(
                f"torch.jit.script: got attention with the pattern {self._pattern!r}; allowed: dense attention "
                "(torch.compile and torch.export take every pattern)"
            )
        plain = _TorchAttention.__new__(_TorchAttention)
        plain.__dict__.update({n: x for n, x in self.__dict__.items() if n not in ("_pattern", "_monitor")})
        plain._qkv_same_embed_dim = self._qkv_same_embed_dim
        return plain

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """As torch, for dense attention. RuntimeError with a pattern: who merges masks is about to go around it."""
        if not is_dense(self._pattern):
            raise RuntimeError(
                "merge_masks: got a call on attention with a pattern; allowed: calls of the module (this one comes "
                "from code that computes dense attention from the module's weights)"
            )
        return super().merge_masks(attn_mask, key_padding_mask, query)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | str | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Any]:
        """Attention of query ``[L, N, E]`` over key ``[S, N, kdim]`` and value ``[S, N, vdim]`` (``batch_first``: N
        first; unbatched: without N).

        Args:
            key_padding_mask: ``[N, S]`` (``[S]``), bool (True: not a key) or floating (added to the scores). Padding at
                the end costs nothing.
            need_weights: True, False or ``"blocks"``; None: True without a pattern, False with one. See the class.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``, bool (True: may not attend) or floating (added).
            average_attn_weights: mean over heads instead of ``[N, num_heads, L, S]``.
            is_causal: says that attn_mask is the causal one; without attn_mask: be causal.

        Returns:
            (output ``[L, N, E]`` as query, weights or None)
        """
        if isinstance(query, Tensor) and query.is_nested and query.dim() == 1:
            raise AssertedError(
                "query: got a nested tensor of no sequences; query should be unbatched 2D or batched 3D tensor but "
                "received 1-D query tensor (MultiheadAttention does not support NestedTensor outside of its fast path)"
            )
        batched = check_shapes(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if need_weights is None:
            need_weights = is_dense(self._pattern)
        elif not isinstance(need_weights, str):
            need_weights = bool(need_weights)
        elif need_weights != "blocks":
            raise ArgumentError(f'need_weights: got {need_weights!r}; allowed: True, False or "blocks"')
        is_causal = bool(is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            if is_dense(self._pattern) and query.layout == torch.strided and not isinstance(need_weights, str):
                return super().forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if need_weights is True and self._torch_infers(query, key, value, key_padding_mask, attn_mask):
            result = super().forward(
                query, key, value, key_padding_mask, True, attn_mask, average_attn_weights, is_causal
            )
            masked = key_padding_mask is not None or attn_mask is not None
            if not (masked and may_look(result[0]) and result[0].isnan().any()):
                return result
            # Its rows that see no key are NaN, ours are 0 in every mode.
        if not batched:
            dim = 0 if self.batch_first else 1
            same_kv, same_qk = key is value, query is key
            query = query.unsqueeze(dim)
            key = query if same_qk else key.unsqueeze(dim)
            value = key if same_kv else value.unsqueeze(dim)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        out, weights = self._attend(
            query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            if isinstance(weights, Tensor):
                weights = weights.squeeze(0)
        return out, weights

    def extra_repr(self) -> str:
        kind = "dense" if self._pattern is None else repr(self._pattern)
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, pattern={kind}"

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Any]:
        call = MultiheadCall(
            num_heads=self.num_heads, in_proj_weight=self.in_proj_weight, in_proj_bias=self.in_proj_bias,
            out_proj_weight=self.out_proj.weight, out_proj_bias=self.out_proj.bias, bias_k=self.bias_k,
            bias_v=self.bias_v, separate_proj_weights=(self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
            add_zero_attn=self.add_zero_attn, batch_first=self.batch_first, pattern=self._pattern,
            dropout_p=float(self.dropout) if self.training else 0.0, monitor=self._measuring(), **options,
        )  # fmt: skip
        return call.run(query, key, value)

    def _torch_infers(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether torch's module would take its inference operator."""
        if (
            not self._qkv_same_embed_dim
            or self._measuring()
            or self.training
            or query is not key
            or key is not value
            or query.dim() != 3
            or not self.batch_first
            or self.in_proj_bias is None
            or self.bias_k is not None
            or self.add_zero_attn
            or self.num_heads % 2
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or not torch.backends.mha.get_fastpath_enabled()
            or torch.is_autocast_enabled()
        ):
            return False
        if any(m is not None and m.is_floating_point() for m in (key_padding_mask, attn_mask)):
            return False
        tensors = (query, self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        return len({t.dtype for t in tensors}) == 1 and not (
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        )

    def _varies_with_length(self) -> bool:
        """Whether the pattern of fewer tokens may be another one than the first part of that of more."""
        config = self._pattern
        return not isinstance(config, PatternConfig) or config.density_decides or config.heads_differ

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool | str,
        attn_mask: Tensor | None, average_attn_weights: bool, is_causal: bool,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Sequences as rows of padded tensors with key lengths; weights are of the padded shape."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise AssertedError("query, key, value: got nested and plain tensors; allowed: all of one kind")
        if not self.batch_first or key_padding_mask is not None or attn_mask is not None:
            raise AssertedError(
                "query: got a nested tensor; allowed: with batch_first=True and neither key_padding_mask nor attn_mask"
            )
        lengths_q, lengths_k, lengths_v = (_nested_lengths(x) for x in (query, key, value))
        if lengths_k != lengths_v:
            raise ArgumentError(f"value: got sequences of {lengths_v} tokens; allowed: {lengths_k}, those of key")
        least_q = least_k = 0
        if isinstance(self._pattern, BlockPattern):  # of the padded lengths that these sequences may have had
            least_q, least_k = self._pattern.seqlen_q, self._pattern.seqlen_k
        elif query.layout == torch.strided and self._varies_with_length():
            warnings.warn(
                f"query: got a nested tensor whose longest sequence has {max(lengths_q, default=0)} tokens: the "
                "pattern is made for them. nn.TransformerEncoder makes such tensors of padded ones; for the pattern of "
                "the padded length, as in training, give it enable_nested_tensor=False, or a fixed pattern.",
                stacklevel=3,
            )
        padded_q = _padded(query, least_q)
        padded_k = padded_q if key is query and least_k == least_q else _padded(key, least_k)
        padded_v = padded_k if value is key else _padded(value, least_k)
        if is_causal and lengths_q != lengths_k:
            raise ArgumentError("is_causal: got nested tensors of different lengths; allowed: query and key alike")
        out, weights = self._attend(
            padded_q, padded_k, padded_v, key_lengths=torch.tensor(lengths_k, dtype=torch.int64),
            need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        if isinstance(weights, Tensor):
            weights = weights[..., : max(lengths_q, default=0), :]
            if padded_k.shape[1] > max(lengths_k, default=0):
                extra = weights.shape[-1] - padded_k.shape[1]  # of bias_k and the zero key, which come last
                ends = weights.split([max(lengths_k, default=0), least_k - max(lengths_k, default=0), extra], -1)
                weights = torch.cat([ends[0], ends[2]], -1)
        rows = [out[i, :n] for i, n in enumerate(lengths_q)]
        if query.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=_offsets(query)), weights
        return torch.nested.as_nested_tensor(rows), weights


def _offsets(t: Any) -> Tensor:
    """Of a jagged tensor; torch's types do not know them."""
    return t.offsets()


def _padded(t: Tensor, least: int) -> Tensor:
    """[N, longest, E] of a nested tensor, or [N, least, E] where that is longer."""
    padded = torch.nested.to_padded_tensor(t, 0.0)
    return nn.functional.pad(padded, (0, 0, 0, max(0, least - padded.shape[1])))


def _nested_lengths(t: Tensor) -> list[int]:
    if t.layout == torch.jagged:
        return _offsets(t).diff().tolist()
    return [x.shape[0] for x in t.unbind()]
