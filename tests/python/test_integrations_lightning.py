"""The Lightning callback logs what the modules measured."""

from __future__ import annotations

import math

import pytest

import torch
from torch import nn

pl = pytest.importorskip("lightning.pytorch")

import tessera  # noqa: E402
from tessera.integrations.lightning import AttentionStats, monitored  # noqa: E402


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.attention = tessera.BlockSparseRingMultiheadDilatedAttention(
            64, 2, sparse_config={"pattern_type": "dilated_sparse", "block_size": 32}, sparsity_ratio=0.25
        )
        self.head = nn.Linear(64, 1)

    def training_step(self, batch, _):
        return self.head(self.attention(batch[0])[0]).square().mean()

    def validation_step(self, batch, i):
        self.log("loss", self.training_step(batch, i))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Log(pl.loggers.Logger):
    name = version = "log"

    def __init__(self):
        super().__init__()
        self.entries = []

    def log_metrics(self, metrics, step=None):
        self.entries.append({k: v for k, v in metrics.items() if k.startswith("tessera/")})

    def log_hyperparams(self, *args, **kwargs):
        pass


def _fit(callback, model, epochs=1, **kwargs):
    log = Log()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 512, 64)), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=log, callbacks=callback, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1, **kwargs,
    )  # fmt: skip
    trainer.fit(model, data, data)
    return [e for e in log.entries if e]


def test_logs_density_speedup_and_quality():
    model = Model()
    entries = _fit(AttentionStats(every_n_steps=2, sample_every=1, per_module=True), model)
    assert not model.attention.performance_monitor.enabled  # as it was before
    assert len(entries) == 3  # two of four steps, and validation
    stats = model.attention.get_performance_stats()
    assert stats["forwards"] == stats["sampled_forwards"] == 4 + 4 + 2  # training, validation, sanity check
    last = entries[-1]
    assert last["tessera/density"] == pytest.approx(stats["density"]) and last["tessera/density"] < 0.5
    assert last["tessera/speedup"] == pytest.approx(stats["avg_speedup"]) and last["tessera/speedup"] > 0
    assert last["tessera/quality"] == pytest.approx(stats["quality_score"]) and 0 < last["tessera/quality"] < 1
    assert last["tessera/attention/density"] == last["tessera/density"]
    assert all(math.isfinite(x) for x in last.values())


@pytest.mark.parametrize("validation", [0, 1.0])
def test_callbacks_can_watch_them(validation):
    class Watch(pl.Callback):
        """After each training batch, and at the end."""

        seen = []

        def on_train_batch_end(self, trainer, *_):
            self.seen.append(dict(trainer.callback_metrics))

        def on_train_end(self, trainer, _):
            self.seen.append(dict(trainer.callback_metrics))

    watch = Watch()
    watch.seen = []
    stop = pl.callbacks.EarlyStopping("tessera/density", mode="min", check_on_train_epoch_end=True)
    callbacks = [AttentionStats(every_n_steps=2, sample_every=1), watch, stop]
    entries = _fit(callbacks, Model(), limit_val_batches=validation, num_sanity_val_steps=0)
    assert "tessera/density" not in watch.seen[0]
    assert watch.seen[1]["tessera/quality"].item() == pytest.approx(entries[0]["tessera/quality"])
    for name, value in entries[-1].items():
        assert watch.seen[-1][name].item() == pytest.approx(value), name
    assert len(entries) == (3 if validation else 2)  # loggers get each once


def test_steps_count_over_epochs():
    # 3 epochs of 4 batches: after batches 5 and 10, neither of which is the fifth of its epoch.
    assert len(_fit(AttentionStats(every_n_steps=5), Model(), epochs=3, limit_val_batches=0)) == 2


def test_a_model_without_attention_that_measures_itself():
    class Plain(Model):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(64, 64)

    assert monitored(Plain()) == {}
    with pytest.raises(ValueError, match="pl_module: got Plain"):
        _fit(AttentionStats(), Plain())


@pytest.mark.parametrize("argument", [{"every_n_steps": 0}, {"sample_every": 0}, {"every_n_steps": 1.5}])
def test_mistakes(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        AttentionStats(**argument)


def test_steps_count_on_after_a_checkpoint():
    callback = AttentionStats(every_n_steps=5)
    _fit(callback, Model(), limit_val_batches=0)  # 4 batches
    resumed = AttentionStats(every_n_steps=5)
    resumed.load_state_dict(callback.state_dict())
    assert len(_fit(resumed, Model(), limit_val_batches=0)) == 1  # the first of this run is the fifth of all
