"""Use of CPU, memory, disk, network and GPU while a run is live, measured by MLflow's monitors under MLflow's names.

MLflow's own thread ends where the server doesn't answer once; these samples go through the run's journal.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from tasks.services.tracking.base import MetricRow

log = logging.getLogger(__name__)


def sample_system(
    log_metrics: Callable[[Iterable[MetricRow]], None], *, interval: float, stopped: threading.Event
) -> None:
    """Log a sample every `interval` seconds until `stopped` is set; steps count the samples, as MLflow's do."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        kinds: tuple[Any, ...] = (CPUMonitor, DiskMonitor, NetworkMonitor)  # untyped
        monitors = [kind() for kind in kinds]
        try:
            monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
        except Exception as error:  # RuntimeError, or NVML's own: no GPU, no driver, no package nvidia-ml-py
            log.debug("GPUs are not measured: %s", error)
        step = 0
        while not stopped.wait(interval):
            rows: list[MetricRow] = []
            for monitor in monitors:
                monitor.collect_metrics()
                rows += [(f"system/{name}", float(value), step) for name, value in monitor.aggregate_metrics().items()]
                monitor.clear_metrics()
            log_metrics(rows)
            step += 1
    except Exception as error:  # what is only watched must not end the training
        log.warning("system metrics end: %s", error)
