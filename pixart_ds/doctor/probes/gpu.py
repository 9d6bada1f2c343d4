"""The GPUs, their driver, and torch's kernels for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pixart_ds.doctor.ask import ask
from pixart_ds.doctor.check import Check, failed, ok, skipped, warning
from pixart_ds.doctor.subject import Subject

_MATMUL_S = 75.0
"""Also for importing torch from a file system that 64 nodes read at the same time."""
_FOREIGN_BYTES = 1 << 30
_GIB = 2**30
_VOLTA = (7, 0)
_LAST_VOLTA_DRIVER = 580
"""R580 is the last branch of drivers for Volta."""
_FIRST_CUDNN_WITHOUT_VOLTA = 91100
"""9.10 has kernels for sm_70, 9.11 dropped them."""
_CAPABILITY = {"v100": (7, 0), "a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}
"""By the first word of a GPU's name in rates.yaml."""

TORCH_FOR_VOLTA = (
    "install the last torch on PyPI with kernels for sm_70: make setup TORCH=2.10.0; or a +cu126 build, "
    "which go up to 2.14: TORCH_INDEX=https://download.pytorch.org/whl/cu126"
)
_SET_NODE_ASIDE = (
    "leave the node out (sbatch --exclude; sbatch: {exclude: NODE} in a profile), and have it looked after"
)

# ---- judgements: pure --------------------------------------------------------------------------------------------------


def judge_architectures(built_for: Sequence[str], capability: tuple[int, int], version: str) -> Check:
    """Whether torch's binaries have code for a GPU: of its own kind, of an earlier one of its generation, or to be compiled.

    Args:
        built_for: `torch.cuda.get_arch_list()`: sm_70, sm_90a, compute_120, …
        capability: Of the GPU.
        version: Of torch.
    """
    name, wanted = "gpu.kernels", f"sm_{capability[0]}{capability[1]}"
    listed = ", ".join(built_for)
    if not built_for:
        return failed(name, f"torch {version} is a build without CUDA", _torch_remedy(capability))
    for word in built_for:
        if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", word)) is None:
            continue
        kind, own, only_this = found[1], (int(found[2]), int(found[3])), bool(found[4])
        if own == capability or (kind == "sm" and own[0] == capability[0] and own[1] < capability[1] and not only_this):
            return ok(name, f"torch {version} has {word} for {wanted}")
        if kind == "compute" and own < capability and not only_this:
            return warning(
                name,
                f"torch {version} has no code for {wanted}, only {word}, which the driver compiles at the first start: {listed}",
                _torch_remedy(capability),
            )
    return failed(
        name,
        f"torch {version} has no kernels for {wanted}, only {listed}: it would end with 'no kernel image is available'",
        _torch_remedy(capability),
    )


def _torch_remedy(capability: tuple[int, int]) -> str:
    return (
        TORCH_FOR_VOLTA
        if capability == _VOLTA
        else "install a build of torch with CUDA for this GPU: make setup TORCH=…"
    )


def judge_driver(driver: str, driver_cuda: int, torch_cuda: str | None, capability: tuple[int, int] | None) -> Check:
    """Whether the driver serves the GPU and torch's CUDA.

    Args:
        driver: 570.124.06.
        driver_cuda: The CUDA that it speaks at most: 12080 is 12.8.
        torch_cuda: That of torch; None if unknown.
        capability: Of the GPU; None if unknown.
    """
    speaks = (driver_cuda // 1000, driver_cuda % 1000 // 10)
    seen = f"driver {driver}, CUDA {speaks[0]}.{speaks[1]}"
    branch = int(driver.partition(".")[0])
    if capability == _VOLTA and branch > _LAST_VOLTA_DRIVER:
        return failed(
            "gpu.driver",
            f"{seen}; R{_LAST_VOLTA_DRIVER} is the last branch for Volta",
            "have a driver of R580 installed",
        )
    if torch_cuda is None:
        return ok("gpu.driver", seen)
    built = tuple(int(part) for part in torch_cuda.split(".")[:2])
    seen += f"; torch is built with CUDA {torch_cuda}"
    if capability == _VOLTA and built[0] > 12:
        return failed("gpu.driver", f"{seen}; 12 is the last CUDA for Volta", TORCH_FOR_VOLTA)
    if speaks[0] < built[0]:
        return failed(
            "gpu.driver",
            seen,
            f"have a driver for CUDA {built[0]} installed, or install a torch built with CUDA {speaks[0]}",
        )
    return ok("gpu.driver", seen)


def judge_cudnn(version: int | None, capability: tuple[int, int]) -> Check:
    """Whether cuDNN has kernels for the GPU; `version` as torch gives it: 91002 is 9.10.2."""
    if version is None:
        return warning("gpu.cudnn", "torch has no cuDNN", "install a build of torch with it")
    words = f"{version // 10000}.{version % 10000 // 100}.{version % 100}" if version >= 90000 else str(version)
    if capability == _VOLTA and version >= _FIRST_CUDNN_WITHOUT_VOLTA:
        return failed("gpu.cudnn", f"cuDNN {words} has no kernels for sm_70, which 9.11 dropped", TORCH_FOR_VOLTA)
    return ok("gpu.cudnn", f"cuDNN {words}")


def judge_bf16(real: bool, precision: str | None) -> Check:
    """Whether the stage asks for a bf16 that the GPU only emulates."""
    if real:
        return ok("gpu.bf16", "in hardware")
    if precision == "bf16":
        return failed(
            "gpu.bf16",
            "this GPU has no bf16 units: torch emulates it, and the stage asks for it",
            "set precision: fp16",
        )
    said = "" if precision is None else f"; the stage trains in {precision}"
    return ok("gpu.bf16", f"emulated, not in hardware{said}")


def judge_attention(found: Mapping[str, str | None], wanted: str, how: str, *, on_gpu: bool) -> Check:
    """Whether the kernel that the stage forces runs; or whether torch, left to choose, has one that saves memory.

    Args:
        found: For each back-end None if it runs, else why not.
        wanted: `execution.attention_backend`.
        how: Channels, precision, device, in words.
        on_gpu: Elsewhere `math` is no loss worth a word.
    """
    runs = [backend for backend, reason in found.items() if reason is None]
    seen = f"{', '.join(runs) or 'nothing'} run{'s' if len(runs) < 2 else ''} with {how}"
    if wanted != "auto" and wanted not in runs:
        return failed(
            "gpu.attention",
            f"execution.attention_backend {wanted} does not run: {found.get(wanted)}; {seen}",
            f"set execution.attention_backend to {' or '.join(['auto', *runs])}",
        )
    if wanted == "math" or (wanted == "auto" and runs == ["math"]):
        if on_gpu:
            return warning(
                "gpu.attention",
                f"{seen}; math needs memory for every pair of tokens",
                "use fp16 or bf16, and a build of torch with memory-efficient kernels for this GPU",
            )
    elif wanted == "auto" and not runs:
        return failed("gpu.attention", seen, "install another build of torch")
    return ok("gpu.attention", f"{seen}; the stage takes {wanted}")


def judge_count(seen: int, expected: int | None, slices: int = 0) -> Check:
    """Whether all GPUs are there that the job was given."""
    if slices:
        return warning("gpu.count", f"{slices} of the GPUs are slices (MIG)", "ask for whole GPUs")
    if seen == 0:
        return failed(
            "gpu.count", "NVML shows no GPU that this process may use", f"ask for GPUs in the job; {_SET_NODE_ASIDE}"
        )
    if expected is not None and seen < expected:
        return failed("gpu.count", f"{seen} of {expected} GPUs are there", _SET_NODE_ASIDE)
    return ok(
        "gpu.count", f"{seen} GPU{'' if seen == 1 else 's'}" + ("" if expected is None else f" of {expected} expected")
    )


def judge_health(gpus: Sequence[Mapping[str, Any]]) -> Check:
    """ECC errors that were not corrected since the driver was loaded, and memory that waits to be taken out of use."""
    bad, soon = [], []
    for gpu in gpus:
        if gpu["uncorrected"]:
            bad.append(f"GPU {gpu['index']}: {gpu['uncorrected']} ECC errors that were not corrected")
        if gpu["rows_failed"]:
            bad.append(f"GPU {gpu['index']}: rows of memory could not be remapped")
        if gpu["pages_pending"]:
            soon.append(f"GPU {gpu['index']}: pages of memory wait to be retired")
        if gpu["rows_pending"]:
            soon.append(f"GPU {gpu['index']}: rows of memory wait to be remapped")
    if bad:
        return failed("gpu.health", "; ".join(bad + soon), f"have the GPU reset; {_SET_NODE_ASIDE}")
    if soon:
        return warning("gpu.health", "; ".join(soon), "have the GPU reset when the job has ended")
    told = sum(gpu["uncorrected"] is not None for gpu in gpus)
    counts = "no uncorrected ECC error" if told else "its ECC errors are not told"
    return ok("gpu.health", f"{counts} on {told or len(gpus)} GPU{'' if (told or len(gpus)) == 1 else 's'}")


def judge_processes(gpus: Sequence[Mapping[str, Any]]) -> Check:
    """Whether somebody else's process, or one that a launch left behind, holds the memory that training needs."""
    foreign = [
        f"GPU {gpu['index']}: process {each['pid']} holds {each['bytes'] / _GIB:.1f} GiB"
        for gpu in gpus
        for each in gpu["processes"]
        if (each["bytes"] or 0) > _FOREIGN_BYTES
    ]
    if foreign:
        return failed("gpu.processes", "; ".join(foreign), f"end them if they are yours; else {_SET_NODE_ASIDE}")
    used = max((gpu["used_bytes"] for gpu in gpus), default=0)
    if used > 2 * _FOREIGN_BYTES:
        return warning(
            "gpu.processes",
            f"{used / _GIB:.1f} GiB of a GPU are taken, by a process that NVML does not name",
            "see who uses the node: nvidia-smi, squeue -w NODE",
        )
    return ok("gpu.processes", f"no process holds more than 1 GiB; at most {used / _GIB:.1f} GiB are taken")


def judge_kind(gpus: Sequence[Mapping[str, Any]], known: str | None) -> Check:
    """Whether all GPUs are alike, and of a kind that plans can be made for."""
    kinds = {(gpu["name"], round(gpu["memory_bytes"] / _GIB, 1)) for gpu in gpus}
    words = ", ".join(f"{name}, {gib:g} GiB" for name, gib in sorted(kinds))
    if len(kinds) > 1:
        return warning(
            "gpu.kind", f"GPUs differ: {words}", "ask for one kind (constraint, gres): all wait for the slowest"
        )
    if known is None:
        return warning(
            "gpu.kind",
            f"{words}: rates.yaml does not have it",
            "give numbers for micro_batch_size and checkpointed_blocks",
        )
    return ok("gpu.kind", f"{len(gpus)} × {words}: {known}")


def capability_of(name: str | None) -> tuple[int, int] | None:
    """Of a GPU by its name in rates.yaml."""
    return _CAPABILITY.get((name or "").split("-")[0])


# ---- probes ------------------------------------------------------------------------------------------------------------


def _absent(subject: Subject, name: str) -> Check | None:
    """The check where NVML has nothing to say."""
    if subject.device == "cpu":
        return skipped(name, "the stage is to run on the CPU")
    error = subject.gpus.error
    if error is None:
        return None
    if subject.gpu_required:
        return skipped(name, "see gpu.driver")
    return skipped(name, f"there is no GPU here ({error})" if name == "gpu.driver" else "there is no GPU here")


def _without_torch(subject: Subject, name: str) -> Check | None:
    """The check where torch has nothing to say of a GPU."""
    if (absent := _absent(subject, name)) is not None:
        return absent
    if subject.torch.error is not None:
        return skipped(name, "see gpu.torch")
    return None if subject.torch.value["capabilities"] else skipped(name, "torch finds no GPU: see gpu.torch")


def driver(subject: Subject) -> Check:
    if subject.device == "cuda" and subject.gpus.error is not None and subject.gpu_required:
        return failed(
            "gpu.driver",
            f"no driver answers: {subject.gpus.error}",
            f"see that nvidia-smi works here; {_SET_NODE_ASIDE}",
        )
    if (absent := _absent(subject, "gpu.driver")) is not None:
        return absent
    said, facts = subject.gpus.value, subject.__dict__.get("torch")  # torch's own word only where it was asked
    torch_cuda = facts.value["cuda"] if facts is not None and facts.value else None
    return judge_driver(said["driver"], said["cuda"], torch_cuda, capability_of(subject.gpu_name))


def count(subject: Subject) -> Check:
    if (absent := _absent(subject, "gpu.count")) is not None:
        return absent
    said = subject.gpus.value
    return judge_count(len(said["gpus"]), subject.granted_gpus, said["slices"])


def health(subject: Subject) -> Check:
    return _absent(subject, "gpu.health") or judge_health(subject.gpus.value["gpus"])


def processes(subject: Subject) -> Check:
    return _absent(subject, "gpu.processes") or judge_processes(subject.gpus.value["gpus"])


def kind(subject: Subject) -> Check:
    if (absent := _absent(subject, "gpu.kind")) is not None:
        return absent
    gpus = subject.gpus.value["gpus"]
    return judge_kind(gpus, subject.gpu_name) if gpus else skipped("gpu.kind", "see gpu.count")


def matmul(subject: Subject) -> Check:
    """One product on every GPU, in a process that may hang."""
    if (absent := _absent(subject, "gpu.matmul")) is not None:
        return absent
    answer = ask("matmul", timeout_s=_MATMUL_S)
    if answer.error is not None:
        return failed(
            "gpu.matmul", answer.error, f"run `pixart-ds doctor` without --quick on this node; {_SET_NODE_ASIDE}"
        )
    wrong = [str(number) for number, right in enumerate(answer.value["right"]) if not right]
    if wrong:
        return failed(
            "gpu.matmul", f"a product of two small matrices is wrong on GPU {', '.join(wrong)}", _SET_NODE_ASIDE
        )
    count = len(answer.value["right"])
    return ok("gpu.matmul", f"right on {count} GPU{'' if count == 1 else 's'}, torch {answer.value['torch']}")


def torch(subject: Subject) -> Check:
    answer = subject.torch
    if answer.error is not None:
        return failed(
            "gpu.torch", f"torch cannot be imported, or hangs: {answer.error}", "make setup; then look at the driver"
        )
    said = answer.value
    words = f"torch {said['torch']}, " + (f"CUDA {said['cuda']}" if said["cuda"] else "without CUDA")
    if said["nccl"]:
        words += f", NCCL {'.'.join(map(str, said['nccl']))}"
    if subject.device == "cuda" and subject.gpus.error is None and not said["finds_gpu"]:
        return failed("gpu.torch", f"{words}: it finds no GPU, though NVML does", "see gpu.driver and gpu.kernels")
    return ok("gpu.torch", words)


def kernels(subject: Subject) -> Check:
    """Also where there is no GPU, if a profile says which one there will be."""
    name = "gpu.kernels"
    if subject.device == "cpu":
        return skipped(name, "the stage is to run on the CPU")
    if subject.torch.error is not None:
        return skipped(name, "see gpu.torch")
    said = subject.torch.value
    here = tuple(said["capabilities"][0]) if said["capabilities"] else capability_of(subject.gpu_name)
    if here is None:
        return skipped(name, "there is no GPU here, and no --profile that names one")
    return judge_architectures(said["architectures"], here, said["torch"])


def cudnn(subject: Subject) -> Check:
    if (absent := _without_torch(subject, "gpu.cudnn")) is not None:
        return absent
    said = subject.torch.value
    return judge_cudnn(said["cudnn"], tuple(said["capabilities"][0]))


def bf16(subject: Subject) -> Check:
    if (absent := _without_torch(subject, "gpu.bf16")) is not None:
        return absent
    return judge_bf16(subject.torch.value["bf16"], subject.stage.precision if subject.stage else None)


def attention(subject: Subject) -> Check:
    if subject.device == "cuda" and (absent := _without_torch(subject, "gpu.attention")) is not None:
        return absent
    if subject.torch.error is not None:
        return skipped("gpu.attention", "see gpu.torch")
    asked = subject.wanted_of_torch
    wanted = subject.stage.execution.attention_backend if subject.stage else "auto"
    how = f"{asked['channels']} channels a head in {asked['dtype']} on {asked['device']}"
    return judge_attention(subject.torch.value["attention"], wanted, how, on_gpu=asked["device"] == "cuda")


QUICK = (driver, count, health, processes, matmul)
FULL = (torch, driver, kind, count, health, processes, matmul, kernels, cudnn, bf16, attention)
