"""Use of processors and memory by a run."""

import time
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import Limit, checked


class Hardware:
    """Measures the use of processors and memory, without blocking.

    Args:
        device: of the policy.
        interval_s: lifetime of a measurement (seconds). The use of processors is the mean since the last measurement, which
            is inaccurate below a tenth of a second.

    Raises:
        InputError: psutil is not installed.
    """

    def __init__(self, device: torch.device, interval_s: float = 0.5) -> None:
        try:
            import psutil  # the hardware extra
        except ImportError as error:
            raise InputError(
                'psutil measures the use of hardware, and is not installed: pip install "ppo-lightning[hardware]"'
            ) from error
        self.device, self.interval_s = device, interval_s
        self._psutil, self._process = psutil, psutil.Process()
        psutil.cpu_percent()  # its first value is meaningless
        self._measured, self._newest = time.monotonic(), {}
        self._use_driver = device.type == "cuda"

    def read(self) -> dict[str, float]:
        """The newest measurement, the same object during its lifetime; empty before the first.

        Returns:
            ``hardware/cpu_percent`` and ``hardware/ram_percent`` of the whole machine; ``hardware/process_ram_mb``, the
            resident memory of this process without its workers (10⁶ bytes). On a GPU ``hardware/gpu_memory_mb`` of all its
            processes (10⁶ bytes), and ``hardware/gpu_percent``, the share of time with kernels, if the driver reports it.
        """
        now = time.monotonic()
        if now - self._measured < self.interval_s:
            return self._newest
        self._measured = now
        measured = {
            "hardware/cpu_percent": self._psutil.cpu_percent(),
            "hardware/ram_percent": self._psutil.virtual_memory().percent,
            "hardware/process_ram_mb": self._process.memory_info().rss / 1e6,
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            measured["hardware/gpu_memory_mb"] = (total - free) / 1e6
        if self._use_driver:
            measured |= self._utilization()
        self._newest = measured
        return measured

    def _utilization(self) -> dict[str, float]:
        """The driver's measurement; after an error it is switched off, since a metric is no reason to fail a run."""
        try:
            return {"hardware/gpu_percent": float(torch.cuda.utilization(self.device))}
        # The driver's library may be absent, forbidden (MIG), or replaced; its errors have no common type.
        except Exception as error:
            self._use_driver = False
            rank_zero_warn(f"hardware/gpu_percent is not measured: {type(error).__name__}: {error}")
            return {}


class HardwareMonitor(Callback):
    """Logs the use of processors and memory at the end of each iteration, at its environment step.

    (Lightning's DeviceStatsMonitor measures twice per batch, logs all sixty of CUDA's memory statistics instead of the
    GPU's use, and needs a logger.) Loggers get the first rank's measurements; each rank has its own in
    ``callback_metrics``.

    Args:
        interval_s: shorter iterations share a measurement, which is logged once (seconds).

    Raises:
        InputError: ``interval_s`` is negative, or psutil is not installed when training starts.
    """

    @checked("HardwareMonitor: {}", interval_s=Limit("be 0 or more seconds", lambda value: value >= 0))
    def __init__(self, interval_s: float = 0.5) -> None:
        self.interval_s = interval_s
        self.hardware: Hardware | None = None
        """Set while training."""
        self._logged: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hardware = Hardware(pl_module.device, self.interval_s)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.hardware is not None
        measured = self.hardware.read()
        if not measured or measured is self._logged:
            return
        self._logged = measured
        cast(PPOModule, pl_module).log_metrics(measured)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "hardware": None}  # belongs to this process
