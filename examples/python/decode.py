"""Generates text with a small model of random weights, token by token over a KV cache, and checks each step against the
model's own pass over the whole text. Two prompts of different lengths in one batch.

    python examples/python/decode.py
"""

import tessera

import torch
from torch import nn

DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY = 128, 8, 2, 2, 256
BLOCK, LONGEST = 16, 1024  # tokens of a block of keys; how long a text may become
# One config makes the pattern of the whole text and the rows of every step. Budgets are even over LONGEST tokens.
CONFIG = tessera.PatternConfig("dilated_sparse", density=0.25, block_size=BLOCK)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.head_dim = DIM // HEADS
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * self.head_dim)
        self.out = nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x, attention):
        """x [B, S, DIM]; attention: a function of q, k and v, [B, S, heads, D]."""
        parts = self.qkv(self.norm(x)).unflatten(-1, (HEADS + 2 * KV_HEADS, self.head_dim))
        x = x + self.out(attention(*parts.split([HEADS, KV_HEADS, KV_HEADS], dim=2)).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens, attentions):
        x = self.embedding(tokens)
        for layer, attention in zip(self.layers, attentions):
            x = layer(x, attention)
        return self.head(x)


def over_a_cache(cache, lengths):
    """Appends the keys and values of new tokens and attends over all; lengths [B]: how many of them each text has."""

    def attention(q, k, v):
        cache.append(k, v, lengths)
        # Rows that are padding of a shorter prompt come out as numbers that nobody reads.
        q = torch.stack([x.roll(x.shape[0] - n, 0) for x, n in zip(q, lengths)])  # the last rows are the text
        out = cache.attend(q, CONFIG, seqlen_total=LONGEST)
        return torch.stack([x.roll(n - x.shape[0], 0) for x, n in zip(out, lengths)])

    return attention


@torch.inference_mode()
def main(steps=40):
    torch.manual_seed(0)
    model = Model()
    prompts = [torch.randint(VOCABULARY, (n,)) for n in (300, 117)]
    caches = [tessera.KVCache(len(prompts), KV_HEADS, DIM // HEADS, block=BLOCK) for _ in range(LAYERS)]

    texts, new = [p.tolist() for p in prompts], nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    count = [len(p) for p in prompts]
    for _ in range(steps):
        logits = model(new, [over_a_cache(cache, count) for cache in caches])
        last = [logits[b, n - 1] for b, n in enumerate(count)]
        for text, row in zip(texts, last):
            text.append(int(row.argmax()))
        new, count = torch.tensor([[text[-1]] for text in texts]), [1] * len(texts)

    # The same logits from one pass over each whole text.
    worst = 0.0
    for b, text in enumerate(texts):
        whole = tessera.patterns.dilated_sparse(LONGEST, density=0.25, block=BLOCK, causal=True)
        rows = whole.for_queries(0, len(text) - 1)
        one_pass = model(
            torch.tensor([text[:-1]]),
            [lambda q, k, v, rows=rows: tessera.block_sparse_attention(q, k, v, rows)] * LAYERS,
        )
        worst = max(worst, float((one_pass[0, -1] - last[b]).abs().max()))
    kept = caches[0].lengths.tolist()
    print(f"{kept} tokens, {sum(c.nbytes for c in caches) / 1e6:.2f} MB; logits as in one pass within {worst:.0e}")
    return worst


if __name__ == "__main__":
    raise SystemExit(main() > 1e-4)
