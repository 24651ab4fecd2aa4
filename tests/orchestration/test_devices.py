import os

from orchestration.devices import Device, Slot, describe, place

GPUS = [
    Device("GPU-a", "H200", load=0.0, memory=0.30),
    Device("GPU-b", "H200", load=0.9, memory=0.05),
    Device("GPU-c", "H200", load=0.1, memory=0.10),
    Device("GPU-d", "H200", load=0.0, memory=0.80),
]


def test_slots_are_packed_on_the_devices_that_have_room():
    slots = place(GPUS, processes=2, max_gpus=None, max_load=0.5, max_memory=0.5)
    assert slots == [
        Slot("cuda:0/0", "GPU-a"),
        Slot("cuda:0/1", "GPU-a"),
        Slot("cuda:2/0", "GPU-c"),
        Slot("cuda:2/1", "GPU-c"),
    ]
    assert describe(GPUS, slots) == "2 of 4 CUDA devices have room (H200, H200): 4 jobs at a time"


def test_the_emptiest_devices_are_taken_first():
    assert place(GPUS, None, max_gpus=1, max_load=0.5, max_memory=0.5) == [Slot("cuda:2", "GPU-c")]
    assert [slot.visible for slot in place(GPUS, 1, 2, 1.0, 1.0)] == ["GPU-b", "GPU-c"]
    assert place(GPUS, None, None, max_load=0.0, max_memory=0.0) == []


def test_without_a_device_the_cpu_is_used_and_the_line_says_so():
    slots = place([], 2, None, 0.5, 0.5)
    assert slots == [Slot("cpu:0", ""), Slot("cpu:1", "")]
    assert describe([], slots) == "no CUDA device found: jobs run on the CPU, 2 jobs at a time"
    assert len(place([], None, None, 0.5, 0.5)) == os.cpu_count()
