"""What a run takes of its machine."""

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
    """Use of processors and memory; nothing waits for a measurement.

    Args:
        device: that the policy is on.
        interval_s: seconds for which a measurement is given again. The use of processors is their mean since the last
            one, and means little over less than a tenth of a second.

    Raises:
        InputError: psutil is not installed.
    """

    def __init__(self, device: torch.device, interval_s: float = 0.5) -> None:
        try:
            import psutil  # the hardware extra
        except ImportError as error:
            raise InputError(
                'the use of hardware is measured by psutil, which is not installed: pip install "ppo-lightning[hardware]"'
            ) from error
        self.device, self.interval_s = device, interval_s
        self._psutil, self._process = psutil, psutil.Process()
        psutil.cpu_percent()  # its first answer means nothing
        self._measured, self._newest = time.monotonic(), {}
        self._asks_driver = device.type == "cuda"

    def read(self) -> dict[str, float]:
        """The newest measurement, the same object while it holds; empty before the first.

        Returns:
            ``hardware/cpu_percent``, of all processors, and ``ram_percent``, both of the whole machine;
            ``process_ram_mb``, resident, of this process without its workers (10⁶ bytes). On a GPU ``gpu_memory_mb``, of
            all processes there (10⁶ bytes), and ``gpu_percent``, the time in which it computed, where its driver says so.
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
        if self._asks_driver:
            measured |= self._utilization()
        self._newest = measured
        return measured

    def _utilization(self) -> dict[str, float]:
        """What the driver says; nothing from then on, where it does not: a number is no reason for a run to fail."""
        try:
            return {"hardware/gpu_percent": float(torch.cuda.utilization(self.device))}
        # The driver's library may be absent, forbidden (MIG), or replaced meanwhile; its errors have no common type.
        except Exception as error:
            self._asks_driver = False
            rank_zero_warn(f"hardware/gpu_percent is not measured: {type(error).__name__}: {error}")
            return {}


class HardwareMonitor(Callback):
    """PPOModule the use of processors and memory at the end of each iteration, at its environment step.

    (Lightning's DeviceStatsMonitor measures twice per batch, logs all sixty of CUDA's memory statistics instead of the
    GPU's use, and needs a logger.) What is logged is of the first process; each has its own
    in ``callback_metrics``.

    Args:
        interval_s: iterations that are shorter share a measurement, which is logged once (seconds).

    Raises:
        InputError: ``interval_s`` is negative, or psutil is not installed when training starts.
    """

    @checked("HardwareMonitor: {}", interval_s=Limit("be 0 or more seconds", lambda value: value >= 0))
    def __init__(self, interval_s: float = 0.5) -> None:
        self.interval_s = interval_s
        self.hardware: Hardware | None = None
        """What measures, while training."""
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
        return {**vars(self), "hardware": None}  # of this process
