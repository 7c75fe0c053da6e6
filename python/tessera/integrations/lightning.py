"""A Lightning callback that logs what block-sparse attention keeps, saves and loses while a model trains::

    trainer = Trainer(callbacks=[tessera.integrations.lightning.AttentionStats(every_n_steps=50)])

Works with the packages ``lightning`` and ``pytorch_lightning``, whichever is installed (or loaded already).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from ._versions import check_version

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # A trainer wants callbacks of its own package: what is loaded already counts first.
    if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
        from pytorch_lightning import Callback
    elif importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch import Callback
    else:
        from pytorch_lightning import Callback

# Logged name: key of get_performance_stats().
STATS = {
    "density": "density",
    "speedup": "avg_speedup",
    "quality": "quality_score",
    "output_error": "output_error",
    "forward_ms": "avg_forward_time_ms",
}


def monitored(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside that measure themselves (``performance_monitor``, ``get_performance_stats``), by name.

    Example:
        >>> from tessera.integrations.lightning import monitored
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), tessera.MultiheadAttention(64, 4))
        >>> list(monitored(model))
        ['1']
    """
    return {
        name: m
        for name, m in module.named_modules()
        if hasattr(m, "performance_monitor") and callable(getattr(m, "get_performance_stats", None))
    }


class AttentionStats(Callback):
    """Turns the monitors of a model's attention modules on while it trains and validates, and logs their means over the
    modules: ``density`` (kept share, as achieved), ``speedup`` (measured against dense attention on sampled calls),
    ``quality`` (share of the true attention mass that is kept, measured on sampled rows), ``output_error``,
    ``forward_ms``. What was not measured yet is not logged. They are in ``trainer.callback_metrics`` as well, for
    callbacks that watch one (``EarlyStopping(monitor="tessera/quality", mode="max")``).

    Args:
        every_n_steps: training batches between two entries of the log, counted over all epochs; the end of validation
            is always logged.
        sample_every: calls of a module between two that are compared with dense attention, which costs time; None: as
            its monitor is set.
        per_module: logs every module under its name too.
        prefix: of the logged names.

    Raises:
        ImportError: Lightning is older than 2.6. ValueError: when training begins and the model has no module that
        measures itself.

    Example:
        >>> from tessera.integrations.lightning import AttentionStats
        >>> AttentionStats(every_n_steps=10).every_n_steps
        10
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        sample_every: int | None = None,
        per_module: bool = False,
        prefix: str = "tessera/",
    ) -> None:
        check_version("lightning", sys.modules[Callback.__module__.split(".")[0]].__version__)
        for name, value in (("every_n_steps", every_n_steps), ("sample_every", sample_every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}; allowed: an int >= 1")
        self.every_n_steps, self.sample_every = every_n_steps, sample_every
        self.per_module, self.prefix = per_module, prefix
        self._enabled: list[Any] = []
        self._batches = 0  # of all epochs: batch_idx begins anew in each

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found = monitored(pl_module)
        if not found:
            raise ValueError(
                f"pl_module: got {type(pl_module).__name__} without a module that measures itself; allowed: a model "
                "with modules that have performance_monitor and get_performance_stats()"
            )
        for module in found.values():
            monitor: Any = module.performance_monitor
            if not monitor.enabled:
                self._enabled.append(monitor)
            monitor.enable(**({} if self.sample_every is None else {"sample_every": self.sample_every}))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for monitor in self._enabled:  # those that were on before stay on
            monitor.disable()
        self._enabled = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the number of training batches."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._batches % self.every_n_steps == 0:
            # Straight to the loggers: what log_dict holds is logged again in the steps between.
            stats = self.stats(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(stats, step=trainer.global_step)
            pl_module.log_dict(stats, on_step=True, on_epoch=False, logger=False)  # to trainer.callback_metrics

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log_dict(self.stats(pl_module), on_step=False, on_epoch=True, sync_dist=True)

    def stats(self, module: nn.Module) -> dict[str, float]:
        """What is logged, by name."""
        values: dict[str, list[float]] = {}
        logged: dict[str, float] = {}
        for name, part in monitored(module).items():
            measured = part.get_performance_stats()  # type: ignore[operator]
            for short, key in STATS.items():
                value = float(measured.get(key, math.nan))
                if math.isfinite(value):
                    values.setdefault(short, []).append(value)
                    if self.per_module:
                        logged[f"{self.prefix}{name}/{short}"] = value
        return {**{self.prefix + short: sum(v) / len(v) for short, v in values.items()}, **logged}
