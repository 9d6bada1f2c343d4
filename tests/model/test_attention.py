"""Packed text against masked text, forced kernels, and fp16's scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixart_ds.errors import MachineError
from pixart_ds.model import AttentionOptions, build, require_backend
from pixart_ds.model import attention as module
from tests.model.test_nets import SIZES, inputs, randomised, small


def gradients(net: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    out = net(**batch)
    out.float().square().mean().backward()
    made = [parameter.grad for name, parameter in net.named_parameters() if "kv_linear.bias" not in name]
    assert all(grad is not None for grad in made)
    return [out.detach(), *made]


def close(one: list[torch.Tensor], two: list[torch.Tensor], tolerance: float) -> bool:
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("checkpointed", ["none", 1, "all"])
@pytest.mark.parametrize("micro", [False, True])
def test_packed_text_is_masked_text(micro: bool, checkpointed: Any) -> None:
    batch = {**inputs(8, 6), "dropped": torch.tensor([False, True, False]), **(SIZES if micro else {})}
    made = []
    for packed in (False, True):
        net = randomised(build(small(micro_conditions=micro), packed_text=packed, checkpointed_blocks=checkpointed))
        made.append(gradients(net, batch))
    assert close(made[1], made[0], 1e-5)
    assert float(made[0][0].abs().max()) > 0.1


def test_nested_tensors_are_the_loop() -> None:
    # What runs on a GPU is one product of nested tensors: the same mathematics here, in torch's math kernel.
    random = torch.Generator().manual_seed(0)
    q = torch.randn(3, 10, 4, 8, generator=random, requires_grad=True)
    kv = torch.randn(12, 2, 4, 8, generator=random, requires_grad=True)
    text = module.Text(kv, lengths=(7, 1, 4), offsets=torch.tensor([0, 7, 8, 12]))
    made = []
    for function in (module._looped_attention, module.jagged_attention):
        out = function(q, *kv.unbind(1), text, 8**-0.5)
        made.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, kv))])
    assert close(made[1], made[0], 1e-5)


@pytest.mark.parametrize("micro", [False, True])
def test_captions_that_come_packed_are_those_that_come_padded(micro: bool) -> None:
    batch = {**inputs(8, 6), "dropped": torch.tensor([False, True, False]), **(SIZES if micro else {})}
    mask = batch["caption_mask"]
    packed = {name: value for name, value in batch.items() if name != "caption_mask"}
    packed |= {"caption_embeds": batch["caption_embeds"][mask], "caption_lengths": tuple(mask.sum(1).tolist())}
    wanted = gradients(randomised(build(small(micro_conditions=micro))), batch)
    for option in (False, True):
        net = randomised(build(small(micro_conditions=micro), packed_text=option, checkpointed_blocks=1))
        assert close(gradients(net, packed), wanted, 1e-5)


def test_packing_takes_real_tokens_in_their_sequence() -> None:
    places, lengths = module.packing(torch.tensor([[True, True, False], [True, False, False], [True, True, True]]))
    assert places.tolist() == [0, 1, 3, 6, 7, 8]
    assert lengths == (2, 1, 3)


def test_a_caption_without_tokens_attends_to_all_when_packed_too() -> None:
    batch = inputs()
    batch["caption_mask"][1] = False
    outs = [randomised(build(small(), packed_text=packed))(**batch) for packed in (False, True)]
    assert torch.allclose(outs[0], outs[1], atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_forced_kernel_that_is_missing_is_an_error_that_says_what_to_do(packed: bool) -> None:
    options = AttentionOptions(backend="memory_efficient", packed_text=packed)
    with pytest.raises(MachineError) as caught:
        require_backend(options, 72, torch.float32, torch.device("cpu"))
    assert "memory_efficient cannot run here: cpu, float32, 72 channels a head" in str(caught.value)
    assert "execution.attention_backend" in str(caught.value)
    for backend in ("auto", "math", "flash"):
        require_backend(AttentionOptions(backend=backend, packed_text=packed), 72, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]


def test_a_forced_kernel_holds_in_the_recomputation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomised(build(small(), attention_backend="math", checkpointed_blocks="all"))
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*parts: Any, **named: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return original(*parts, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    net(**inputs()).sum().backward()
    assert seen == [False] * 8  # two blocks, two attentions, forward and again in backward
    assert torch.backends.cuda.flash_sdp_enabled()


def test_other_errors_of_attention_are_left_as_they_are() -> None:
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="size"):
        module.attention(q, torch.zeros(1, 1, 2, 4), q, None, AttentionOptions())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "memory_efficient"])
def test_packed_text_is_masked_text_on_a_gpu(dtype: torch.dtype, backend: Any) -> None:
    batch: dict[str, Any] = {name: value.cuda() for name, value in inputs(16, 12).items()}
    made = []
    for packed in (False, True):
        # 72 channels a head, as at full size
        config = small(hidden_size=288, num_heads=4)
        net = randomised(build(config, packed_text=packed, attention_backend=backend)).to("cuda", dtype)
        for parameter in net.parameters():
            parameter.data.mul_(0.2)
        made.append(gradients(net, batch))
    assert close(made[1], made[0], 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
def test_packed_text_never_waits_for_the_device() -> None:
    net = randomised(build(small(hidden_size=288), packed_text=True)).to("cuda", torch.float16)
    mask = inputs()["caption_mask"]
    batch: dict[str, Any] = {name: value.cuda() for name, value in inputs().items()} | {"caption_mask": mask}
    net(**batch)  # tables of positions are made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(**batch).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
