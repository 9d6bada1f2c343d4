"""What follows from what was seen: pure, and to the letter."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from pixart_ds.config.profile import Profile
from pixart_ds.doctor.check import Check, failed, ok, overall, skipped, warning
from pixart_ds.doctor.page import page, tally
from pixart_ds.doctor.probes import config, data, gpu, machine, network, slurm
from pixart_ds.doctor.probes.machine import Space
from tests.doctor import subjects

V100, A100, H100 = (7, 0), (8, 0), (9, 0)
CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # 2.10.0 from PyPI
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # 2.11.0 from PyPI


def seen(check: Check) -> tuple[str, str]:
    return check.verdict, check.evidence


# ---- GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built_for", "capability", "verdict", "evidence"),
    [
        (CU128, V100, "ok", "torch 2.x has sm_70 for sm_70"),
        (
            CU130,
            V100,
            "failed",
            "torch 2.x has no kernels for sm_70, only sm_75, sm_80, sm_86, sm_90, sm_100, sm_120, compute_120: "
            "it would end with 'no kernel image is available'",
        ),
        ([], V100, "failed", "torch 2.x is a build without CUDA"),
        (CU130, A100, "ok", "torch 2.x has sm_80 for sm_80"),
        (["sm_80"], (8, 9), "ok", "torch 2.x has sm_80 for sm_89"),
        (
            ["sm_60", "compute_60"],
            V100,
            "warning",
            "torch 2.x has no code for sm_70, only compute_60, which the driver compiles at the first start: sm_60, compute_60",
        ),
        (
            ["sm_90a", "compute_90a"],
            (9, 1),
            "failed",
            "torch 2.x has no kernels for sm_91, only sm_90a, compute_90a: it would end with 'no kernel image is available'",
        ),
        (["sm_90a"], H100, "ok", "torch 2.x has sm_90a for sm_90"),
    ],
)
def test_torch_needs_code_for_the_gpu(built_for: list[str], capability: Any, verdict: str, evidence: str) -> None:
    check = gpu.judge_architectures(built_for, capability, "2.x")
    assert seen(check) == (verdict, evidence)


def test_the_remedy_for_v100s_names_builds_that_exist() -> None:
    volta, other = (gpu.judge_architectures([], capability, "2.x").remedy for capability in (V100, A100))
    assert volta == (
        "install the last torch on PyPI with kernels for sm_70: make setup TORCH=2.10.0; or a +cu126 build, "
        "which go up to 2.14: TORCH_INDEX=https://download.pytorch.org/whl/cu126"
    )
    assert other == "install a build of torch with CUDA for this GPU: make setup TORCH=…"


@pytest.mark.parametrize(
    ("driver", "cuda", "torch_cuda", "capability", "verdict", "evidence"),
    [
        ("570.124.06", 12080, "12.8", V100, "ok", "driver 570.124.06, CUDA 12.8; torch is built with CUDA 12.8"),
        ("580.65.06", 13000, "12.8", V100, "ok", "driver 580.65.06, CUDA 13.0; torch is built with CUDA 12.8"),
        ("590.1", 13010, "12.8", V100, "failed", "driver 590.1, CUDA 13.1; R580 is the last branch for Volta"),
        ("590.1", 13010, "13.0", A100, "ok", "driver 590.1, CUDA 13.1; torch is built with CUDA 13.0"),
        (
            "580.65.06",
            13000,
            "13.0",
            V100,
            "failed",
            "driver 580.65.06, CUDA 13.0; torch is built with CUDA 13.0; 12 is the last CUDA for Volta",
        ),
        ("570.1", 12080, "13.0", A100, "failed", "driver 570.1, CUDA 12.8; torch is built with CUDA 13.0"),
        ("535.1", 12020, "12.8", A100, "ok", "driver 535.1, CUDA 12.2; torch is built with CUDA 12.8"),
        ("570.1", 12080, None, None, "ok", "driver 570.1, CUDA 12.8"),
    ],
)
def test_drivers(driver: str, cuda: int, torch_cuda: Any, capability: Any, verdict: str, evidence: str) -> None:
    assert seen(gpu.judge_driver(driver, cuda, torch_cuda, capability)) == (verdict, evidence)


def test_what_to_do_about_a_driver() -> None:
    assert gpu.judge_driver("590.1", 13010, None, V100).remedy == "have a driver of R580 installed"
    assert gpu.judge_driver("570.1", 12080, "13.0", A100).remedy == (
        "have a driver for CUDA 13 installed, or install a torch built with CUDA 12"
    )


@pytest.mark.parametrize(
    ("version", "capability", "verdict", "evidence"),
    [
        (91002, V100, "ok", "cuDNN 9.10.2"),
        (91100, V100, "failed", "cuDNN 9.11.0 has no kernels for sm_70, which 9.11 dropped"),
        (92600, A100, "ok", "cuDNN 9.26.0"),
        (8907, V100, "ok", "cuDNN 8907"),
        (None, V100, "warning", "torch has no cuDNN"),
    ],
)
def test_cudnn(version: int | None, capability: Any, verdict: str, evidence: str) -> None:
    assert seen(gpu.judge_cudnn(version, capability)) == (verdict, evidence)


@pytest.mark.parametrize(
    ("real", "precision", "verdict", "evidence"),
    [
        (True, "bf16", "ok", "in hardware"),
        (False, "fp16", "ok", "emulated, not in hardware; the stage trains in fp16"),
        (False, None, "ok", "emulated, not in hardware"),
        (False, "bf16", "failed", "this GPU has no bf16 units: torch emulates it, and the stage asks for it"),
    ],
)
def test_bf16(real: bool, precision: str | None, verdict: str, evidence: str) -> None:
    assert seen(gpu.judge_bf16(real, precision)) == (verdict, evidence)


HOW = "72 channels a head in float16 on cuda"


@pytest.mark.parametrize(
    ("runs", "wanted", "verdict", "evidence"),
    [
        (
            ["memory_efficient", "math"],
            "memory_efficient",
            "ok",
            f"memory_efficient, math run with {HOW}; the stage takes memory_efficient",
        ),
        (["memory_efficient", "math"], "auto", "ok", f"memory_efficient, math run with {HOW}; the stage takes auto"),
        (
            ["memory_efficient", "math"],
            "flash",
            "failed",
            f"execution.attention_backend flash does not run: no kernel; memory_efficient, math run with {HOW}",
        ),
        (["math"], "auto", "warning", f"math runs with {HOW}; math needs memory for every pair of tokens"),
        (["math"], "math", "warning", f"math runs with {HOW}; math needs memory for every pair of tokens"),
        ([], "auto", "failed", f"nothing runs with {HOW}"),
    ],
)
def test_attention(runs: list[str], wanted: str, verdict: str, evidence: str) -> None:
    found = {name: None if name in runs else "no kernel" for name in ("memory_efficient", "flash", "math")}
    assert seen(gpu.judge_attention(found, wanted, HOW, on_gpu=True)) == (verdict, evidence)


def test_on_a_cpu_math_is_no_loss_and_a_forced_kernel_that_is_not_there_is() -> None:
    found = {"memory_efficient": "none", "flash": "none", "math": None}
    assert gpu.judge_attention(found, "auto", "…", on_gpu=False).verdict == "ok"
    check = gpu.judge_attention(found, "memory_efficient", "…", on_gpu=False)
    assert (check.verdict, check.remedy) == ("failed", "set execution.attention_backend to auto or math")


@pytest.mark.parametrize(
    ("there", "expected", "slices", "verdict", "evidence"),
    [
        (8, 8, 0, "ok", "8 GPUs of 8 expected"),
        (1, None, 0, "ok", "1 GPU"),
        (7, 8, 0, "failed", "7 of 8 GPUs are there"),
        (0, None, 0, "failed", "NVML shows no GPU that this process may use"),
        (0, 2, 2, "warning", "2 of the GPUs are slices (MIG)"),
    ],
)
def test_number_of_gpus(there: int, expected: int | None, slices: int, verdict: str, evidence: str) -> None:
    assert seen(gpu.judge_count(there, expected, slices)) == (verdict, evidence)


@pytest.mark.parametrize(
    ("changes", "verdict", "evidence"),
    [
        ({}, "ok", "no uncorrected ECC error on 2 GPUs"),
        ({"uncorrected": 3}, "failed", "GPU 1: 3 ECC errors that were not corrected"),
        (
            {"uncorrected": 3, "pages_pending": True},
            "failed",
            "GPU 1: 3 ECC errors that were not corrected; GPU 1: pages of memory wait to be retired",
        ),
        ({"rows_failed": True}, "failed", "GPU 1: rows of memory could not be remapped"),
        ({"pages_pending": True}, "warning", "GPU 1: pages of memory wait to be retired"),
        ({"rows_pending": True}, "warning", "GPU 1: rows of memory wait to be remapped"),
        ({"uncorrected": None}, "ok", "no uncorrected ECC error on 1 GPU"),
    ],
)
def test_health(changes: dict[str, Any], verdict: str, evidence: str) -> None:
    assert seen(gpu.judge_health([subjects.gpu(0), subjects.gpu(1, **changes)])) == (verdict, evidence)


def test_a_gpu_without_ecc_says_so() -> None:
    assert gpu.judge_health([subjects.gpu(0, uncorrected=None)]).evidence == "its ECC errors are not told on 1 GPU"


@pytest.mark.parametrize(
    ("changes", "verdict", "evidence"),
    [
        ({}, "ok", "no process holds more than 1 GiB; at most 0.3 GiB are taken"),
        ({"processes": [{"pid": 7, "bytes": 5 << 30}]}, "failed", "GPU 0: process 7 holds 5.0 GiB"),
        (
            {"processes": [{"pid": 7, "bytes": 100 << 20}]},
            "ok",
            "no process holds more than 1 GiB; at most 0.3 GiB are taken",
        ),
        (
            {"processes": [{"pid": 7, "bytes": None}], "used_bytes": 9 << 30},
            "warning",
            "9.0 GiB of a GPU are taken, by a process that NVML does not name",
        ),
    ],
)
def test_strangers_on_a_gpu(changes: dict[str, Any], verdict: str, evidence: str) -> None:
    assert seen(gpu.judge_processes([subjects.gpu(0, **changes)])) == (verdict, evidence)


def test_kinds_of_gpus() -> None:
    two = [subjects.gpu(0), subjects.gpu(1)]
    assert seen(gpu.judge_kind(two, "v100-32gb")) == ("ok", "2 × Tesla V100-SXM2-32GB, 31.7 GiB: v100-32gb")
    assert seen(gpu.judge_kind(two, None)) == ("warning", "Tesla V100-SXM2-32GB, 31.7 GiB: rates.yaml does not have it")
    mixed = [*two, subjects.gpu(2, name="Tesla V100-SXM2-16GB", memory_bytes=16 << 30)]
    assert seen(gpu.judge_kind(mixed, "v100-32gb")) == (
        "warning",
        "GPUs differ: Tesla V100-SXM2-16GB, 16 GiB, Tesla V100-SXM2-32GB, 31.7 GiB",
    )


@pytest.mark.parametrize(
    ("name", "capability"),
    [("v100-16gb", V100), ("a100-80gb", A100), ("h200", H100), (None, None), ("l4", None)],
)
def test_capabilities_of_the_tables_gpus(name: str | None, capability: Any) -> None:
    assert gpu.capability_of(name) == capability


# ---- machine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skew", "verdict", "evidence"),
    [
        (0.02, "ok", "within 5 s of the store (+0.0 s)"),
        (-7.0, "warning", "7.0 s behind the store"),
        (90.0, "failed", "90.0 s ahead of the store"),
    ],
)
def test_clocks(skew: float, verdict: str, evidence: str) -> None:
    assert seen(machine.judge_clock("machine.clock", skew, "the store")) == (verdict, evidence)


@pytest.mark.parametrize(
    ("space", "verdict", "evidence"),
    [
        (Space(50_000_000_000, 1_000_000), "ok", "/r: 50 GB and 1,000,000 inodes free"),
        (Space(50_000_000_000, None), "ok", "/r: 50 GB and inodes not counted free"),
        (
            Space(15_000_000_000, None),
            "warning",
            "/r: 15 GB and inodes not counted free; 22.1 GB would be enough for a checkpoint",
        ),
        (
            Space(5_000_000_000, None),
            "failed",
            "/r: 5 GB and inodes not counted free; 11.1 GB are needed for a checkpoint",
        ),
        (Space(50_000_000_000, 12), "failed", "/r: 50 GB and 12 inodes free; below 1,000 inodes"),
        (Space(50_000_000_000, 2_000), "warning", "/r: 50 GB and 2,000 inodes free; below 20,000 inodes"),
    ],
)
def test_space(space: Space, verdict: str, evidence: str) -> None:
    bounds = 11_100_000_000, 22_100_000_000
    assert seen(machine.judge_space("machine.run_space", "/r", space, bounds, "a checkpoint", "…")) == (
        verdict,
        evidence,
    )


@pytest.mark.parametrize(
    ("size", "free", "on_gpu", "verdict", "evidence"),
    [
        (64 << 30, 64 << 30, True, "ok", "68.7 GB of 68.7 GB free"),
        (64 << 20, 64 << 20, True, "warning", "67.1 MB of 67.1 MB free: little for NCCL between many GPUs"),
        (64 << 20, 1 << 20, True, "failed", "1.05 MB of 67.1 MB free: too little for NCCL"),
        (None, 0, True, "failed", "there is no /dev/shm"),
        (None, 0, False, "warning", "there is no /dev/shm"),
    ],
)
def test_shared_memory(size: int | None, free: int, on_gpu: bool, verdict: str, evidence: str) -> None:
    assert seen(machine.judge_shm(size, free, on_gpu=on_gpu)) == (verdict, evidence)


@pytest.mark.parametrize(
    ("soft", "hard", "verdict", "evidence"),
    [
        (65536, 65536, "ok", "a process may open 65,536 files"),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok", "a process may open any number of files"),
        (1024, 4096, "warning", "a process may open 1,024 files (it may ask for 4,096)"),
        (64, resource.RLIM_INFINITY, "failed", "a process may open 64 files (it may ask for any number)"),
    ],
)
def test_open_files(soft: int, hard: int, verdict: str, evidence: str) -> None:
    assert seen(machine.judge_files(soft, hard)) == (verdict, evidence)


def test_quotas() -> None:
    header = "Disk quotas for user me (uid 1000):\n  Filesystem blocks quota limit grace files quota limit grace\n"
    assert seen(machine.judge_quota(header + "  nas:/home 10 100 120  5 0 0\n")) == ("ok", "no quota is exceeded")
    assert seen(machine.judge_quota(header + "  nas:/home 110* 100 120 6days 5 0 0\n")) == (
        "failed",
        "above the quota: nas:/home 110* 100 120 6days 5 0 0",
    )
    assert machine.judge_quota("").evidence == "no quota is set"


WANTED = ["torch>=2.10,<2.16", "deepspeed==0.19.8", "numpy>=1.26,<2.2", 'pytest>=8; extra == "dev"']
SOUND = {"torch": "2.10.0+cu128", "deepspeed": "0.19.8", "numpy": "2.1.0"}


@pytest.mark.parametrize(
    ("changes", "python", "verdict", "evidence"),
    [
        ({}, "3.11.7", "ok", "Python 3.11.7, and 3 packages in their ranges"),
        ({"numpy": "2.5.1"}, "3.12.0", "ok", "Python 3.12.0, and 3 packages in their ranges"),  # the pinned list has it
        ({"numpy": "2.4.0"}, "3.11.7", "warning", "numpy 2.4.0 is not <2.2,>=1.26"),
        ({"deepspeed": "0.18.0"}, "3.11.7", "failed", "deepspeed 0.18.0 is not ==0.19.8"),
        ({"torch": None, "numpy": "1.0"}, "3.11.7", "failed", "torch is not installed; numpy 1.0 is not <2.2,>=1.26"),
        ({}, "3.10.1", "failed", "Python 3.10.1 is not >=3.11"),
    ],
)
def test_packages(changes: dict[str, str | None], python: str, verdict: str, evidence: str) -> None:
    check = machine.judge_packages(WANTED, {"numpy": "2.5.1"}, {**SOUND, **changes}, (python, ">=3.11"))
    assert seen(check) == (verdict, evidence)


# ---- network, data, Slurm, config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "ranks", "link", "verdict", "evidence"),
    [
        (110e9, 8, "NVLink", "ok", "all-reduce of 268 MB over 8 GPUs (NVLink): 110 GB/s of the bus"),
        (
            9e9,
            8,
            "NVLink",
            "warning",
            "all-reduce of 268 MB over 8 GPUs (NVLink): 9 GB/s of the bus; 20 GB/s is the least to expect",
        ),
        (9e9, 4, "PCIe", "ok", "all-reduce of 268 MB over 4 GPUs (PCIe): 9 GB/s of the bus"),
        (
            1e6,
            2,
            "memory",
            "warning",
            "all-reduce of 268 MB over 2 gloo processes (memory): 1 MB/s of the bus; 20 MB/s is the least to expect",
        ),
    ],
)
def test_all_reduce(rate: float, ranks: int, link: str, verdict: str, evidence: str) -> None:
    assert seen(network.judge_all_reduce(rate, ranks, 1 << 28, link)) == (verdict, evidence)


def test_the_link_of_a_node() -> None:
    assert network.link_between([subjects.gpu(0), subjects.gpu(1)]) == "NVLink"
    assert network.link_between([subjects.gpu(0), subjects.gpu(1, nvlinks=0)]) == "PCIe"


@pytest.mark.parametrize(
    ("size", "seconds", "need", "every_pass", "verdict", "evidence"),
    [
        (
            4_000_000_000,
            8.0,
            384e6,
            False,
            "ok",
            "s3://b/p: 500 MB/s (4 GB by 8 threads); the stage needs 384 MB/s a node",
        ),
        (
            800_000_000,
            8.0,
            384e6,
            False,
            "warning",
            "s3://b/p: 100 MB/s (800 MB by 8 threads); the stage needs 384 MB/s a node: the GPUs wait, until what a node reads "
            "lies in its cache",
        ),
        (
            800_000_000,
            8.0,
            384e6,
            True,
            "failed",
            "s3://b/p: 100 MB/s (800 MB by 8 threads); the stage needs 384 MB/s a node",
        ),
        (
            800_000_000,
            8.0,
            None,
            True,
            "ok",
            "s3://b/p: 100 MB/s (800 MB by 8 threads); what the stage needs is not known without a GPU or a --profile",
        ),
        (18_000, 0.01, 384e6, True, "ok", "s3://b/p: 18 kB in 0.01 s by 8 threads: too small a set to measure"),
    ],
)
def test_throughput(size: int, seconds: float, need: Any, every_pass: bool, verdict: str, evidence: str) -> None:
    assert seen(data.judge_throughput("s3://b/p", size, seconds, need, every_pass=every_pass)) == (verdict, evidence)


JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}


@pytest.mark.parametrize(
    ("changes", "hosts", "verdict", "evidence"),
    [
        ({}, ["n1", "n2"], "ok", "job 71, 2 nodes: n[1-2]"),
        ({}, None, "ok", "job 71, 2 nodes: n[1-2]"),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}, ["n1"], "ok", "job 71, 1 node: n1"),
        (
            {"SLURM_JOB_NUM_NODES": "3"},
            ["n1", "n2"],
            "failed",
            "SLURM_JOB_NUM_NODES is 3, but SLURM_JOB_NODELIST names 2",
        ),
        (
            {"SLURMD_NODENAME": "m7"},
            ["n1", "n2"],
            "failed",
            "SLURMD_NODENAME is m7, which SLURM_JOB_NODELIST does not name",
        ),
        ({"SLURM_JOB_NODELIST": ""}, None, "failed", "SLURM_JOB_NODELIST is not set"),
        (
            {"RANK": "0", "MASTER_ADDR": "old"},
            None,
            "warning",
            "RANK, MASTER_ADDR set in the job's script: they win over what Slurm says",
        ),
        ({"RANK": "0", "SLURM_STEP_ID": "0"}, None, "ok", "job 71, 2 nodes: n[1-2]"),
    ],
)
def test_slurms_variables(changes: dict[str, str], hosts: list[str] | None, verdict: str, evidence: str) -> None:
    assert seen(slurm.judge_variables({**JOB, **changes}, hosts)) == (verdict, evidence)


@pytest.mark.parametrize(
    ("visible", "granted", "in_step", "verdict", "evidence"),
    [
        ("0,1,2,3", 4, False, "ok", "4 of 4 GPUs in CUDA_VISIBLE_DEVICES"),
        (None, 4, False, "ok", "4 granted on this node; CUDA_VISIBLE_DEVICES is not set, so all can be seen"),
        ("0", 4, True, "ok", "1 of 4 GPUs in CUDA_VISIBLE_DEVICES: one bound to this task"),
        ("0", 4, False, "failed", "1 of 4 GPUs in CUDA_VISIBLE_DEVICES"),
        ("", 4, False, "failed", "0 of 4 GPUs in CUDA_VISIBLE_DEVICES"),
        ("0", None, False, "failed", "the job has no GPUs (SLURM_GPUS_ON_NODE is not set)"),
    ],
)
def test_gpus_granted(visible: str | None, granted: int | None, in_step: bool, verdict: str, evidence: str) -> None:
    assert seen(slurm.judge_gpus(visible, granted, in_step=in_step)) == (verdict, evidence)


@pytest.mark.parametrize(
    ("allowed", "profile", "verdict", "evidence"),
    [
        (True, None, "ok", "the job may be requeued"),
        (False, False, "ok", "the job may not be requeued; the profile has a second job wait behind it"),
        (False, None, "failed", "the job may not be requeued (Requeue=0): it ends for good at its time limit"),
        (False, True, "failed", "the job may not be requeued (Requeue=0): it ends for good at its time limit"),
    ],
)
def test_requeue(allowed: bool, profile: bool | None, verdict: str, evidence: str) -> None:
    assert seen(slurm.judge_requeue(allowed, profile)) == (verdict, evidence)


H = 3600.0


@pytest.mark.parametrize(
    ("limit", "left", "interval", "verdict", "evidence"),
    [
        (
            20 * H,
            19 * H,
            H,
            "ok",
            "19 h 00 min left of 20 h 00 min, warned 5 min 00 s before the end; a checkpoint every 1 h 00 min",
        ),
        (20 * H, 19 * H, None, "ok", "19 h 00 min left of 20 h 00 min, warned 5 min 00 s before the end"),
        (
            600.0,
            600.0,
            60.0,
            "failed",
            "10 min 00 s left of 10 min 00 s, warned 5 min 00 s before the end; a checkpoint every 1 min 00 s: "
            "it would do nothing but stop",
        ),
        (
            2 * H,
            2 * H,
            3 * H,
            "failed",
            "2 h 00 min left of 2 h 00 min, warned 5 min 00 s before the end; a checkpoint every 3 h 00 min: "
            "a crash would cost the whole attempt",
        ),
        (
            20 * H,
            H,
            2 * H,
            "warning",
            "1 h 00 min left of 20 h 00 min, warned 5 min 00 s before the end; a checkpoint every 2 h 00 min: "
            "the next stop is the next checkpoint",
        ),
        (
            20 * H,
            60.0,
            None,
            "warning",
            "1 min 00 s left of 20 h 00 min, warned 5 min 00 s before the end: the next stop is the next checkpoint",
        ),
    ],
)
def test_time_limits(limit: float, left: float, interval: float | None, verdict: str, evidence: str) -> None:
    assert seen(slurm.judge_time(limit, left, 300.0, interval)) == (verdict, evidence)


SINFO = "gpu*|20:00:00|4|gpu:v100:8(S:0-1)\ngpu*|20:00:00|2|gpu:v100:4\ncpu|infinite|9|(null)\n"


@pytest.mark.parametrize(
    ("changes", "asked", "verdict", "evidence"),
    [
        ({}, "20:00:00", "ok", "partition gpu: 6 nodes with up to 8 GPUs"),
        ({"partition": "gpu"}, "10:00:00", "ok", "partition gpu: 6 nodes with up to 8 GPUs"),
        ({"partition": "gpus"}, "10", "failed", "there is no partition gpus; the site has cpu, gpu"),
        ({"partition": "cpu"}, "10", "failed", "a node of partition cpu has 0 GPUs, the profile says 8"),
        ({}, "1-00:00:00", "failed", "partition gpu allows 20 h 00 min, the profile asks 1 d 00 h"),
    ],
)
def test_partitions(changes: dict[str, Any], asked: str, verdict: str, evidence: str) -> None:
    profile = Profile(description="a site", gpus_per_node=8, **changes)
    assert seen(slurm.judge_partition(profile, SINFO, asked)) == (verdict, evidence)


def test_a_site_without_a_default_partition() -> None:
    check = slurm.judge_partition(Profile(description="a site", gpus_per_node=8), SINFO.replace("*", ""), "10")
    assert seen(check) == ("failed", "there is no default partition; the site has cpu, gpu")


def test_fields_of_a_job() -> None:
    found = slurm.fields_of(
        "JobId=7 JobName=a UserId=me(1) JobState=RUNNING Requeue=1 EndTime=1795619634 Command=(null)"
    )
    assert (found["Requeue"], found["EndTime"], found["JobState"]) == ("1", "1795619634", "RUNNING")


@pytest.mark.parametrize(
    ("precision", "gpu_name", "bf16", "verdict", "evidence"),
    [
        ("fp16", "v100-32gb", False, "ok", "fp16 on v100-32gb"),
        ("bf16", "v100-32gb", False, "failed", "precision bf16, and v100-32gb has no bf16 units"),
        ("bf16", "a100-80gb", True, "ok", "bf16 on a100-80gb"),
        ("fp32", "v100-32gb", False, "warning", "precision fp32 on v100-32gb: its tensor cores are not used"),
    ],
)
def test_precision(precision: str, gpu_name: str, bf16: bool, verdict: str, evidence: str) -> None:
    assert seen(config.judge_precision(precision, gpu_name, has_bf16=bf16)) == (verdict, evidence)


# ---- the whole ---------------------------------------------------------------------------------------------------------


def test_the_worst_verdict_counts_and_what_was_skipped_does_not() -> None:
    good, bad, soso, none = ok("a.b", "…"), failed("a.b", "…", "…"), warning("a.b", "…", "…"), skipped("a.b", "…")
    assert overall([good, none]) == "ok"
    assert overall([good, soso, none]) == "warning"
    assert overall([soso, bad, good]) == "failed"
    assert tally([good, bad, soso, none, none]) == "1 ok, 1 warning, 1 failed, 2 skipped"
    assert tally([good, soso, soso]) == "1 ok, 2 warnings, 0 failed, 0 skipped"


def test_the_page_groups_by_subject_with_what_to_do_below() -> None:
    checks = [
        ok("machine.run_space", "/r: 5 GB free"),
        failed("gpu.kernels", "torch has none " + "and none " * 12, "make setup TORCH=2.10.0"),
        skipped("gpu.bf16", "there is no GPU here"),
    ]
    assert page("n1, cuda", checks).splitlines() == [
        "doctor: n1, cuda",
        "",
        "machine",
        "  ok       run space      /r: 5 GB free",
        "",
        "gpu",
        "  FAILED   kernels        torch has none and none and none and none and none and none and none and none and none and",
        "                          none and none and none and none",
        "                          to do: make setup TORCH=2.10.0",
        "  skipped  bf16           there is no GPU here",
        "",
        "1 ok, 0 warnings, 1 failed, 1 skipped",
    ]
