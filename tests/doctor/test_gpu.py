"""The probes of GPUs, over an NVML and a torch that answer as real ones do; on a GPU, the real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pixart_ds.doctor.ask import Answer, ask
from pixart_ds.doctor.children import nvml as child
from pixart_ds.doctor.children.matmul import is_right
from pixart_ds.doctor.examine import QUICK, examine, full
from pixart_ds.doctor.probes import config, gpu, network
from tests.doctor.subjects import gpus, on_node, subject, torch_facts

NO_DRIVER = Answer(error="NVML: Driver Not Loaded")


class FakeNvml:
    """The part of pynvml that is used, over GPUs of one kind; a code in place of a value is the error it answers with."""

    def __init__(self, count: int = 2, **values: Any) -> None:
        self.count = count
        self.values: dict[str, Any] = {
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetRetiredPagesPendingStatus": 0,
            "nvmlDeviceGetRemappedRows": pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED),
            "nvmlDeviceGetComputeRunningProcesses": [],
            **values,
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML"):
            return getattr(pynvml, name)
        if name in self.values:
            return lambda *_: self._answer(name)
        raise AttributeError(name)

    def _answer(self, name: str) -> Any:
        value = self.values[name]
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.124.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= self.count:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid[-1])

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "Tesla V100-SXM2-32GB"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=32 << 30, used=300 << 20)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 6:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return pynvml.NVML_FEATURE_ENABLED if link else pynvml.NVML_FEATURE_DISABLED


def test_the_functions_that_are_used_are_pynvmls() -> None:
    for name in [*vars(FakeNvml), *FakeNvml().values]:
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))


def test_what_nvml_says_of_a_sound_node() -> None:
    found = child.facts(FakeNvml(), None)
    assert {key: found[key] for key in ("driver", "cuda", "on_node", "slices")} == {
        "driver": "570.124.06",
        "cuda": 12080,
        "on_node": 2,
        "slices": 0,
    }
    assert found["gpus"][1] == {
        "index": "1",
        "name": "Tesla V100-SXM2-32GB",
        "memory_bytes": 32 << 30,
        "used_bytes": 300 << 20,
        "uncorrected": 0,
        "pages_pending": False,
        "rows_pending": None,
        "rows_failed": None,
        "nvlinks": 5,
        "processes": [],
    }


def test_only_the_gpus_that_cuda_will_see_are_asked() -> None:
    assert [each["index"] for each in child.facts(FakeNvml(8), "2,5")["gpus"]] == ["2", "5"]
    assert [each["index"] for each in child.facts(FakeNvml(8), "GPU-1")["gpus"]] == ["GPU-1"]
    assert child.facts(FakeNvml(8), "MIG-1,MIG-2")["slices"] == 2
    assert child.facts(FakeNvml(8), "")["gpus"] == []


def test_what_a_gpu_cannot_tell_is_null_and_one_that_is_lost_is_an_error() -> None:
    unsupported = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    found = child.facts(FakeNvml(1, nvmlDeviceGetTotalEccErrors=unsupported), None)
    assert found["gpus"][0]["uncorrected"] is None
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(pynvml.NVMLError, match="lost"):
        child.facts(FakeNvml(1, nvmlDeviceGetTotalEccErrors=lost), None)


def test_rows_and_processes() -> None:
    running = [SimpleNamespace(pid=7, usedGpuMemory=5 << 30)]
    nvml = FakeNvml(1, nvmlDeviceGetRemappedRows=(0, 1, 1, 0), nvmlDeviceGetComputeRunningProcesses=running)
    (found,) = child.facts(nvml, None)["gpus"]
    assert (found["rows_pending"], found["rows_failed"]) == (True, False)
    assert found["processes"] == [{"pid": 7, "bytes": 5 << 30}]


def verdicts(*pairs: Any) -> dict[str, str]:
    return {check.name: check.verdict for check in pairs}


def test_a_sound_node_of_v100s() -> None:
    sound = on_node(Answer(gpus()), Answer(torch_facts()), environment={"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"})
    probes = [probe for probe in gpu.FULL if probe is not gpu.matmul]
    found = examine(sound, probes, (60.0, 60.0))
    assert [check for check in found if check.verdict != "ok"] == []
    said = {check.name: check.evidence for check in found}
    assert said["gpu.torch"] == "torch 2.10.0+cu128, CUDA 12.8, NCCL 2.27.5"
    assert said["gpu.count"] == "8 GPUs of 8 expected"
    assert said["gpu.kind"] == "8 × Tesla V100-SXM2-32GB, 31.7 GiB: v100-32gb"
    assert (
        said["gpu.attention"]
        == "memory_efficient, math run with 72 channels a head in float16 on cuda; the stage takes auto"
    )


def test_the_usual_mistake_on_v100s() -> None:
    facts = torch_facts(torch="2.13.0+cu130", cuda="13.0", architectures=["sm_75", "sm_80"], cudnn=91900)
    node = on_node(Answer(gpus()), Answer(facts))
    found = verdicts(gpu.torch(node), gpu.driver(node), gpu.kernels(node), gpu.cudnn(node))
    assert found == {"gpu.torch": "ok", "gpu.driver": "failed", "gpu.kernels": "failed", "gpu.cudnn": "failed"}


def test_in_a_job_a_driver_that_does_not_answer_is_said_once() -> None:
    node = on_node(NO_DRIVER)
    check = gpu.driver(node)
    assert (check.verdict, check.evidence) == ("failed", "no driver answers: NVML: Driver Not Loaded")
    assert check.remedy == (
        "see that nvidia-smi works here; leave the node out (sbatch --exclude; sbatch: {exclude: NODE} in a profile), "
        "and have it looked after"
    )
    rest = [gpu.count(node), gpu.health(node), gpu.processes(node), gpu.matmul(node), network.all_reduce(node)]
    assert {(each.verdict, each.evidence) for each in rest} == {("skipped", "see gpu.driver")}


def test_on_a_login_node_the_kernels_are_still_looked_for_if_a_profile_names_the_gpu() -> None:
    from pixart_ds.config.profile import load_profile

    facts = torch_facts(capabilities=[], finds_gpu=False, bf16=None, attention=None, architectures=["sm_75"])
    login = on_node(NO_DRIVER, Answer(facts), gpu_required=False)
    assert gpu.driver(login).evidence == "there is no GPU here (NVML: Driver Not Loaded)"
    assert gpu.kernels(login).evidence == "there is no GPU here, and no --profile that names one"
    login = on_node(NO_DRIVER, Answer(facts), gpu_required=False, profile=load_profile("generic-v100"))
    assert gpu.kernels(login).evidence.startswith("torch 2.10.0+cu128 has no kernels for sm_70, only sm_75")
    rest = [
        gpu.count(login),
        gpu.kind(login),
        gpu.bf16(login),
        gpu.attention(login),
        gpu.cudnn(login),
        gpu.matmul(login),
    ]
    assert {(each.verdict, each.evidence) for each in rest} == {("skipped", "there is no GPU here")}


def test_a_torch_that_cannot_be_imported_is_said_once() -> None:
    node = on_node(Answer(gpus()), Answer(error="exit code 1: ImportError: libcudart.so.12"))
    check = gpu.torch(node)
    assert check.evidence == "torch cannot be imported, or hangs: exit code 1: ImportError: libcudart.so.12"
    assert (check.verdict, check.remedy) == ("failed", "make setup; then look at the driver")
    rest = [gpu.kernels(node), gpu.cudnn(node), gpu.bf16(node), gpu.attention(node)]
    assert {(each.verdict, each.evidence) for each in rest} == {("skipped", "see gpu.torch")}


def test_a_torch_that_finds_no_gpu_though_nvml_does() -> None:
    facts = torch_facts(torch="2.13.0+cpu", cuda=None, nccl=None, finds_gpu=False, capabilities=[], architectures=[])
    node = on_node(Answer(gpus()), Answer(facts))
    assert gpu.torch(node).evidence == "torch 2.13.0+cpu, without CUDA: it finds no GPU, though NVML does"
    assert gpu.kernels(node).evidence == "torch 2.13.0+cpu is a build without CUDA"
    assert gpu.bf16(node).evidence == "torch finds no GPU: see gpu.torch"


@pytest.mark.parametrize(
    ("answer", "verdict", "evidence"),
    [
        (Answer({"torch": "2.10.0", "right": [True, True]}), "ok", "right on 2 GPUs, torch 2.10.0"),
        (
            Answer({"torch": "2.10.0", "right": [True, False]}),
            "failed",
            "a product of two small matrices is wrong on GPU 1",
        ),
        (Answer(error="no answer within 75 s"), "failed", "no answer within 75 s"),
    ],
)
def test_one_product_on_every_gpu(answer: Answer, verdict: str, evidence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ask", lambda *_, **__: answer)
    check = gpu.matmul(on_node(Answer(gpus(2))))
    assert (check.verdict, check.evidence) == (verdict, evidence)


def test_the_product_is_exact() -> None:
    assert is_right("cpu")


def test_a_single_gpu_has_nothing_to_reduce_with() -> None:
    check = network.all_reduce(on_node(Answer(gpus(1))))
    assert (check.verdict, check.evidence) == ("skipped", "1 GPU here: there is nothing to reduce with")


def test_memory_by_the_gpus_that_are_here() -> None:
    from pixart_ds.config.load import load_stage

    def said(*sets: str) -> tuple[str, str]:
        check = config.memory(on_node(Answer(gpus()), stage=load_stage("stage2", list(sets))))
        return check.verdict, check.evidence

    verdict, evidence = said()
    assert verdict == "ok"
    assert evidence.startswith("micro-batches of 178, 28 blocks checkpointed, on v100-32gb: ")
    assert evidence.endswith(" of 29.2 GiB, estimated")
    verdict, evidence = said("execution.checkpointed_blocks=none")
    assert verdict == "failed"
    assert evidence.startswith("micro-batches of 178, 0 blocks checkpointed, on v100-32gb: ")
    assert said("execution.micro_batch_size=auto", "execution.checkpointed_blocks=auto")[0] == "ok"
    bf16 = on_node(Answer(gpus()), stage=load_stage("stage2", ["precision=bf16", "execution.deepspeed=zero2_a100"]))
    assert config.precision(bf16).evidence == "precision bf16, and v100-32gb has no bf16 units"
    assert config.memory(bf16).verdict == "skipped"


def test_what_torch_says_here_of_attention() -> None:
    """A real torch on a CPU."""
    check = gpu.attention(subject())
    assert check.verdict == "ok"
    assert "math run" in check.evidence
    assert check.evidence.endswith("with 72 channels a head in float32 on cpu; the stage takes auto")


@pytest.mark.gpu
def test_real_gpus_answer_everything() -> None:
    here = subject(device="cuda", gpu_required=True)
    found = examine(here, gpu.FULL, (300.0, 600.0))
    assert [check for check in found if check.verdict in ("failed", "skipped")] == []


@pytest.mark.gpu
def test_the_quick_half_on_real_gpus() -> None:
    found = {check.name: check for check in examine(subject(device="cuda", gpu_required=True), QUICK, (60.0, 100.0))}
    assert found["gpu.matmul"].evidence.startswith("right on ")
    assert found["gpu.driver"].verdict == "ok"


@pytest.mark.gpu
def test_nccl_reduces_over_real_gpus() -> None:
    import torch

    check = network.all_reduce(subject(device="cuda", gpu_required=True))
    if torch.cuda.device_count() < 2:
        assert check.verdict == "skipped"
    else:
        assert "GPUs (" in check.evidence


def test_the_child_of_nvml_says_in_one_sentence_why_there_is_none() -> None:
    answer = ask("nvml", timeout_s=60.0)
    if answer.error is None:  # it has one: then it says which GPUs there are
        assert answer.value is not None
    else:
        assert answer.error.startswith("NVML: ")
        assert "Traceback" not in answer.error


def test_every_check_has_a_name_of_its_own_also_where_nothing_can_be_looked_at() -> None:
    cpu = subject()
    names = [
        check.name
        for check in examine(cpu, [probe for probe in full() if probe is not network.all_reduce], (60.0, 120.0))
    ]
    assert len(set(names)) == len(names)
