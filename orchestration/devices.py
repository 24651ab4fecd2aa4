"""Where jobs can run: the CUDA devices of this machine that have room, or its CPU."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A CUDA device: its UUID, its name, and which fractions (0 to 1) of its time and memory are in use."""

    uuid: str
    name: str
    load: float
    memory: float


@dataclass(frozen=True)
class Slot:
    """A place for one worker: a name for people, and what CUDA_VISIBLE_DEVICES is there."""

    name: str
    visible: str


def cuda_devices() -> list[Device]:
    """Return the CUDA devices of this machine as NVML reports them; none where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_device(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _device(handle: object) -> Device:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Device(
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        load=pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        memory=memory.used / memory.total,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def place(
    devices: list[Device], processes: int | None, max_gpus: int | None, max_load: float, max_memory: float
) -> list[Slot]:
    """Return one slot for each worker: `processes` (default 1) on each device that has room.

    A device has room where its load and its memory in use are at most these fractions; of those at most `max_gpus` are
    taken, the emptiest first. Without any CUDA device the slots are on the CPU: `processes` of them, by default one a
    core.
    """
    if not devices:
        return [Slot(f"cpu:{number}", "") for number in range(processes or os.cpu_count() or 1)]
    roomy = sorted(
        (device for device in devices if device.load <= max_load and device.memory <= max_memory),
        key=lambda device: (device.memory, device.load),
    )
    chosen = {device.uuid for device in roomy[:max_gpus]}
    return [
        Slot(f"cuda:{index}/{number}" if processes and processes > 1 else f"cuda:{index}", device.uuid)
        for index, device in enumerate(devices)
        if device.uuid in chosen
        for number in range(processes or 1)
    ]


def describe(devices: list[Device], slots: list[Slot]) -> str:
    """Return the first line that a manager prints: where its jobs run."""
    count = f"{len(slots)} job{'s' if len(slots) != 1 else ''} at a time"
    if not devices:
        return f"no CUDA device found: jobs run on the CPU, {count}"
    used = {slot.visible for slot in slots}
    names = ", ".join(device.name for device in devices if device.uuid in used)
    return f"{len(used)} of {len(devices)} CUDA devices have room ({names}): {count}"
