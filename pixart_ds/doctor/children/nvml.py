"""Prints what NVML says of the driver and of the GPUs that this process may use, as JSON; null where it does not say."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from pixart_ds.errors import EXIT_DONE, EXIT_MACHINE, MachineError
from pixart_ds.meters import nvml as meter
from pixart_ds.meters.nvml import visible_gpus


def facts(nvml: Any, visible: str | None) -> dict[str, Any]:
    """Driver, and a row for each GPU.

    Args:
        nvml: The module pynvml, or what answers like it.
        visible: Value of CUDA_VISIBLE_DEVICES; None if it is not set.

    Raises:
        NVMLError: There is no driver, or a GPU that was lost.
    """
    nvml.nvmlInit()
    count = nvml.nvmlDeviceGetCount()
    names = visible_gpus(visible, count)
    return {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "cuda": nvml.nvmlSystemGetCudaDriverVersion(),  # 12080: 12.8
        "on_node": count,
        "slices": sum(name.startswith("MIG-") for name in names),
        "gpus": [_gpu(nvml, name) for name in names if not name.startswith("MIG-")],
    }


def _gpu(nvml: Any, name: str) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    # rows are remapped from A100 on; V100s retire pages
    remapped = _if_told(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    return {
        "index": name,
        "name": nvml.nvmlDeviceGetName(handle),
        "memory_bytes": memory.total,
        "used_bytes": memory.used,
        "uncorrected": _if_told(nvml, lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, *kinds)),
        "pages_pending": _if_told(nvml, lambda: bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))),
        "rows_pending": None if remapped is None else bool(remapped[2]),
        "rows_failed": None if remapped is None else bool(remapped[3]),
        "nvlinks": _nvlinks(nvml, handle),
        "processes": [
            {"pid": each.pid, "bytes": each.usedGpuMemory}
            for each in _if_told(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        ],
    }


def _nvlinks(nvml: Any, handle: Any) -> int:
    """Links of the GPU that are up."""
    up = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = _if_told(nvml, lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link))  # type: ignore[misc]
        if state is None:  # it has no link of this number
            break
        up += state == nvml.NVML_FEATURE_ENABLED
    return up


def _if_told(nvml: Any, call: Callable[[], Any]) -> Any:
    """The answer; None where this GPU or driver has none. A GPU that is lost is no such case."""
    try:
        return call()
    except nvml.NVMLError as cause:
        if cause.value == nvml.NVML_ERROR_GPU_IS_LOST:
            raise
        return None


def main() -> int:
    try:
        nvml = meter.load_pynvml()
    except MachineError as error:
        print(error.what, file=sys.stderr)
        return EXIT_MACHINE
    try:
        print(json.dumps(facts(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))))
    except nvml.NVMLError as error:
        print(f"NVML: {error}", file=sys.stderr)
        return EXIT_MACHINE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
