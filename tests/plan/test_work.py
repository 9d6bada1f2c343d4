"""What a step computed, and its part of the peak: against the paper's own runs and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pixart_ds.config.schema import ModelConfig
from pixart_ds.plan.counts import Net, training_flops
from pixart_ds.plan.fit import GIB
from pixart_ds.plan.work import Peak, Work, peak_of, rates, work_of

XL = Net.of(ModelConfig(kind="pixart", caption_channels=4096, max_tokens=120))
DIT = Net.of(ModelConfig(kind="dit", num_classes=1000))


def test_the_papers_second_stage_is_21_percent_of_its_v100s() -> None:
    """178 images on each of 64 V100s in 6.05 s: 29.4 images/s a GPU, 26.3 TFLOP/s of 125 (Table 4; cost-and-hardware D.2)."""
    images = 178 * 64
    work = work_of(XL, 28, images=images, tokens=256, text_tokens=120 * images)
    figures = rates(work, 6.05, 64, 64 * 125e12)
    assert figures["images_per_second_per_rank"] == pytest.approx(29.4, abs=0.05)
    assert figures["model_tflops_per_rank"] == pytest.approx(26.3, rel=0.01)
    assert figures["mfu"] == pytest.approx(0.211, abs=0.002)
    assert figures["hfu"] == pytest.approx(0.281, abs=0.003)
    assert figures["image_tokens_per_second"] == pytest.approx(images * 256 / 6.05)
    assert figures["text_tokens_per_second"] == pytest.approx(images * 120 / 6.05)
    unknown = rates(work, 6.05, 64, None)
    assert (unknown["mfu"], unknown["hfu"]) == (None, None)
    assert unknown["images_per_second"] == figures["images_per_second"]


@pytest.mark.parametrize("checkpointed", [0, 7, 28])
def test_captions_of_any_lengths_add_up_exactly(checkpointed: int) -> None:
    lengths = [1, 17, 120, 64, 3]
    work = work_of(XL, checkpointed, images=5, tokens=240, text_tokens=sum(lengths))
    each = [replace(XL, tokens=240, text=length) for length in lengths]
    assert work.model_flops == sum(training_flops(net) for net in each)
    assert work.hardware_flops == sum(training_flops(net, checkpointed) for net in each)
    assert (work.images, work.image_tokens, work.text_tokens) == (5, 1200, 205)


def test_classes_have_no_text_and_works_add_up() -> None:
    one = work_of(DIT, 28, images=3, tokens=256, text_tokens=0)
    assert one.model_flops == 3 * training_flops(DIT)
    assert one + Work(0) == one
    assert (one + one).hardware_flops == 6 * training_flops(DIT, 28)


@pytest.mark.parametrize(
    ("cuda_name", "gib", "precision", "peak"),
    [
        ("Tesla V100-SXM2-32GB", 31.7, "fp16", Peak("v100-32gb", 125e12, "fp16")),
        ("Tesla V100-SXM2-16GB", 15.8, "fp32", Peak("v100-16gb", 15.7e12, "fp32")),
        ("Tesla V100-PCIE-32GB", 31.7, "fp16", Peak("v100-32gb", 112e12, "fp16")),
        ("NVIDIA A100-SXM4-40GB", 39.4, "bf16", Peak("a100-40gb", 312e12, "bf16")),
        ("NVIDIA H100 80GB HBM3", 79.1, "bf16", Peak("h100", 989e12, "bf16")),
        ("NVIDIA A100-SXM4-40GB", 4.75, "bf16", None),  # a slice
        ("NVIDIA GeForce RTX 4090", 23.6, "bf16", None),
    ],
)
def test_peaks_are_the_tables(cuda_name: str, gib: float, precision: str, peak: Peak | None) -> None:
    assert peak_of(cuda_name, int(gib * GIB), precision) == peak
