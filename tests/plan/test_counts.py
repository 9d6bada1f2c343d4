"""The formulas against torch: parameters and FLOPs counted on the nets, bytes counted as autograd saves them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pixart_ds.config.schema import ModelConfig
from pixart_ds.diffusion.loss import diffusion_loss
from pixart_ds.model import DiT, PixArt, build
from pixart_ds.plan import counts
from pixart_ds.plan.counts import Net
from pixart_ds.plan.step_time import Way, elementwise_bytes

KINDS: dict[str, dict[str, Any]] = {
    "PixArt": {"kind": "pixart"},
    "PixArt-MS": {"kind": "pixart", "micro_conditions": True},
    "DiT": {"kind": "dit"},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEPTH = 4


def model(kind: str, **changes: Any) -> ModelConfig:
    """A small net."""
    small = {"depth": DEPTH, "hidden_size": 96, "num_heads": 4, "base_size": 12}
    own = {"caption_channels": 80, "max_tokens": 24} if KINDS[kind]["kind"] == "pixart" else {"num_classes": 10}
    return ModelConfig.model_validate({**small, **own, **KINDS[kind], **changes})


def full_size(kind: str, base_size: int) -> ModelConfig:
    """XL/2."""
    own = {"caption_channels": 4096, "max_tokens": 120} if KINDS[kind]["kind"] == "pixart" else {"num_classes": 1000}
    return ModelConfig.model_validate({"base_size": base_size, **own, **KINDS[kind]})


def inputs(config: ModelConfig, batch: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The largest batch of a net: a square picture, captions without padding."""
    side = config.base_size * config.patch_size
    with torch.device(device):
        values = {
            "latents": torch.zeros(batch, config.in_channels, side, side),
            "timesteps": torch.zeros(batch, dtype=torch.int64),
            "dropped": torch.zeros(batch, dtype=torch.bool),
        }
        if config.kind == "dit":
            return values | {"class_labels": torch.zeros(batch, dtype=torch.int64)}
        assert config.max_tokens is not None
        assert config.caption_channels is not None
        values |= {
            "caption_embeds": torch.zeros(batch, config.max_tokens, config.caption_channels),
            "caption_mask": torch.ones(batch, config.max_tokens, dtype=torch.bool),
        }
        sizes = {"original_sizes": torch.ones(batch, 2), "aspect_ratios": torch.ones(batch)}
        return values | (sizes if config.micro_conditions else {})


@pytest.mark.parametrize("base_size", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_buffers_are_exact_at_full_size(kind: str, base_size: int) -> None:
    config = full_size(kind, base_size)
    with torch.device("meta"):
        net = build(config)
    made = Net.of(config)
    assert sum(counts.parameters(made).values()) == sum(p.numel() for p in net.parameters())
    assert counts.buffer_bytes(made) == sum(b.numel() * b.element_size() for b in net.buffers())
    assert counts.largest_parameter(made) == max(p.numel() for p in net.parameters())
    parts = counts.parameters(made)
    assert parts["blocks"] == sum(p.numel() for p in net.blocks.parameters())
    assert parts["final"] == sum(p.numel() for p in net.final_layer.parameters())


def flops(config: ModelConfig, checkpointed: int, device: str) -> tuple[float, float]:
    """Forward's and training's FLOPs of one picture as torch counts them."""
    with torch.device(device):
        net = build(config, checkpointed_blocks=checkpointed)
    batch = inputs(config, 2, device)
    with sdpa_kernel(SDPBackend.MATH):  # the counter knows no FLOPs of the CPU's own attention kernel
        with FlopCounterMode(display=False) as forward:
            loss = net(**batch).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() / 2, (forward.get_total_flops() + backward.get_total_flops()) / 2


@pytest.mark.parametrize("checkpointed", [0, 3, DEPTH])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_agree_with_torchs_counter_in_small(kind: str, checkpointed: int) -> None:
    config = model(kind)
    forward, training = flops(config, checkpointed, "cpu")
    net = Net.of(config)
    assert sum(counts.forward_flops(net).values()) == pytest.approx(forward, rel=0.005)
    assert counts.training_flops(net, checkpointed) == pytest.approx(training, rel=0.005)


@pytest.mark.parametrize("checkpointed", [0, 10, 28])
@pytest.mark.parametrize(("kind", "base_size"), [("PixArt", 16), ("PixArt", 32), ("PixArt-MS", 64), ("DiT", 16)])
def test_flops_agree_with_torchs_counter_at_full_size(kind: str, base_size: int, checkpointed: int) -> None:
    config = full_size(kind, base_size)
    forward, training = flops(config, checkpointed, "meta")
    net = Net.of(config)
    assert sum(counts.forward_flops(net).values()) == pytest.approx(forward, rel=0.005)
    assert counts.training_flops(net, checkpointed) == pytest.approx(training, rel=0.005)


def test_the_known_figures_of_the_full_net() -> None:
    """The table that the throughput of Table 4 was judged by: GFLOP of a picture, forward."""
    for base_size, wanted in ((16, 298.1), (32, 1236.0), (64, 6510.0)):
        forward = counts.forward_flops(Net.of(full_size("PixArt", base_size)))
        assert sum(forward.values()) / 1e9 == pytest.approx(wanted, rel=0.001)
    assert sum(counts.forward_flops(Net.of(full_size("DiT", 16))).values()) / 1e9 == pytest.approx(237.3, rel=0.001)


def saved_bytes(net: PixArt | DiT, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of all storages that are kept of a forward pass and its loss, without the parameters.

    What autograd saves, and what the blocks are given: checkpointed ones keep it to run again, the captions unseen by autograd.
    """
    ours = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}
    alive = []  # lest a freed storage's address be given again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep_given(block: torch.nn.Module, given: tuple[Any, ...]) -> None:
        values = [part for value in given for part in (vars(value).values() if is_dataclass(value) else [value])]
        for value in values:
            if isinstance(value, torch.Tensor):
                keep(value)

    hooks = [block.register_forward_pre_hook(keep_given) for block in net.blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss(net(**batch), batch)
    for hook in hooks:
        hook.remove()
    return sum(kept.values())


def _loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return diffusion_loss(output, batch["latents"], torch.ones_like(batch["latents"]), batch["timesteps"]).total.sum()


@pytest.mark.parametrize("checkpointed", [0, 2, DEPTH])
@pytest.mark.parametrize("fp32_attention", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_bytes_agree_with_what_autograd_saves(
    kind: str, precision: str, fp32_attention: bool, checkpointed: int
) -> None:
    config = model(kind)
    net = build(config, fp32_attention=fp32_attention, checkpointed_blocks=checkpointed).to(DTYPES[precision])
    counted = saved_bytes(net, inputs(config, 4)) / 4
    formula = counts.saved(Net.of(config), precision, fp32_attention=fp32_attention)
    assert formula.total(DEPTH, checkpointed) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["PixArt-MS", "DiT"])
def test_activation_bytes_agree_at_full_width(kind: str, checkpointed: int) -> None:
    config = full_size(kind, 16).model_copy(update={"depth": 2})
    net = build(config, checkpointed_blocks=checkpointed).to(torch.bfloat16)
    formula = counts.saved(Net.of(config), "bf16")
    assert formula.total(2, checkpointed) == pytest.approx(saved_bytes(net, inputs(config, 1)), rel=0.05)


@pytest.fixture
def _quiet_profiler(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    capfd.readouterr()


@pytest.mark.usefixtures("_quiet_profiler")
@pytest.mark.parametrize("checkpointed", [0, 2, DEPTH])
@pytest.mark.parametrize("kind", ["PixArt", "DiT"])
def test_the_peak_of_a_training_step_is_foreseen(kind: str, checkpointed: int) -> None:
    """All that is allocated between forward and the end of backward, gradients freed as the engine frees them."""
    config, batch_size = model(kind, hidden_size=192), 4
    net = build(config, checkpointed_blocks=checkpointed).to(torch.bfloat16)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = inputs(config, batch_size)

    def step() -> None:
        _loss(net(**batch), batch).backward()

    step()  # the table of positions is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    made = Net.of(config)
    each = counts.saved(made, "bf16").peak(DEPTH, checkpointed) + counts.workspace(made, "bf16")
    foreseen = batch_size * each + 2 * counts.largest_parameter(made)
    assert 0.97 < foreseen / peak < 1.2  # on the safe side


VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "unsqueeze",
    "squeeze",
}
VIEWS |= {"alias", "detach", "as_strided", "unbind", "empty", "empty_like", "split_with_sizes"}
PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu_backward"}


class MovedBytes(TorchDispatchMode):
    """Bytes that all operations other than products, attention and views read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] not in VIEWS | PRODUCTS:
            for value in tree_leaves((args, kwargs, result)):
                if isinstance(value, torch.Tensor):
                    whole = 0 not in value.stride()
                    self.total += value.numel() * value.element_size() if whole else value.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["PixArt", "DiT"])
def test_elementwise_bytes_of_a_block_are_those_of_the_operations(kind: str, precision: str) -> None:
    """The difference of two depths; a tenth either way, for the operations are torch's to choose."""
    moved = []
    for depth in (1, 3):
        config = model(kind, depth=depth, hidden_size=192, base_size=16)
        net, batch = build(config).to(DTYPES[precision]), inputs(config, 2)
        with MovedBytes() as mode:
            net(**batch).sum().backward()
        moved.append(mode.total)
    formula = elementwise_bytes(Net.of(model(kind, depth=2, hidden_size=192, base_size=16)), Way(precision, 0))
    assert formula == pytest.approx((moved[1] - moved[0]) / 2, rel=0.1)
