"""Training under ZeRO-2: exact gradient sums, one reduction a step, fp32 masters with EMA, all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pixart_ds.config.load import fingerprint, identity
from pixart_ds.config.schema import ModelConfig, OptimizerConfig, StageConfig
from pixart_ds.engine import deepspeed_compat as compat
from pixart_ds.engine.optimizer import AdamWEMA, learning_rate
from pixart_ds.engine.shards import FlatLayout, Place
from pixart_ds.engine.world import World
from pixart_ds.errors import CheckpointError

_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTER_KEYS = ("global_steps", "global_samples", "skipped_steps")

Fill = Callable[[str, Sequence[tuple[str, int, int]], torch.Tensor], None]
"""(shard key, [(parameter, start, end), …], out): fills `out`, fp32 on the CPU, with those parts of the flattened parameters."""


@dataclass(frozen=True)
class StepResult:
    """What became of a step, the same on all ranks.

    Attributes:
        applied: False if all ranks refused it because of a non-finite loss or gradient.
        grad_norm: L2 norm of the whole gradient before clipping, without the loss scale; inf if refused.
        loss_scale: fp16's scale for the next step; 1 in other precisions.
        learning_rate: Of this step.
        consecutive_skips: Steps refused in a row up to this one; 0 if applied.
    """

    applied: bool
    grad_norm: float
    loss_scale: float
    learning_rate: float
    consecutive_skips: int

    def figures(self) -> dict[str, bool | float | int]:
        """By name, for the log."""
        return asdict(self)


class Engine:
    """A net under DeepSpeed's ZeRO-2.

    Each micro-batch's gradient is added to a local fp32 sum. A step reduces the sum once, in fp32, so that each rank
    gets its partition; DeepSpeed then takes the norm, clips, updates the fp32 masters and gathers the 16-bit copies.
    Backward holds no collective: ranks may run different numbers of micro-batches, or none.

    Make it with `build`; then `initialise`, or resume through `Shelf`.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        stage: StageConfig,
        world: World,
        frozen: dict[str, torch.Tensor],
        fingerprints: dict[str, str],
    ) -> None:
        self.net = deepspeed_engine
        """The net under DeepSpeed; call it like the net itself."""
        self.world = world
        self.precision = stage.precision
        self.consecutive_skips = 0
        self._stage = stage
        self._zero = deepspeed_engine.optimizer
        self._adam: AdamWEMA = self._zero.optimizer
        self.fingerprints = fingerprints
        self._frozen = frozen
        self.layout = self._read_layout()
        self._sum = torch.zeros_like(self._zero.bit16_groups_flat[0], dtype=torch.float32)
        self._adam.seed()
        compat.stop_reducing_in_backward(self.net)
        compat.keep_going_at_minimum_scale(self.net)
        for parameter, place in zip(self._zero.bit16_groups[0], self.layout.places, strict=True):
            parameter.register_post_accumulate_grad_hook(
                _adding_to(self._sum[place.offset : place.end].view(place.shape))
            )

    @classmethod
    def build(cls, net: nn.Module, stage: StageConfig, world: World, config: dict[str, Any]) -> Engine:
        """Puts a net under DeepSpeed. Its weights do not matter yet: `initialise` or a checkpoint sets them.

        Args:
            net: fp32, on the CPU; DeepSpeed casts and moves it in place.
            stage: Optimizer, precision, batch and length are taken from it.
            world: The ranks, joined.
            config: DeepSpeed's, as `config.deepspeed.merge` made it.
        """
        frozen = {name: tensor.detach().clone() for name, tensor in net.named_parameters() if not tensor.requires_grad}
        adam = AdamWEMA([parameter for parameter in net.parameters() if parameter.requires_grad], stage.optimizer)
        fingerprints = {"stage": fingerprint(identity(stage)), "deepspeed": fingerprint(config)}
        return cls(compat.initialise(net, adam, config, world.device), stage, world, frozen, fingerprints)

    def _read_layout(self) -> FlatLayout:
        """The flat shards' layout as DeepSpeed made it, checked: all that is stored rests on it."""
        zero = self._zero
        if len(zero.bit16_groups) != 1 or zero.round_robin_gradients or any(map(any, zero.round_robin_bit16_padding)):
            raise RuntimeError("DeepSpeed's shards are not one sequence of parameters back to back")
        offsets = zero.round_robin_bit16_offsets[0]
        places = tuple(
            Place(zero.param_names[parameter], int(offset), tuple(parameter.shape))
            for parameter, offset in zip(zero.bit16_groups[0], offsets, strict=True)
        )
        layout = FlatLayout(places, int(zero.partition_size[0]), self.world.size)
        if problems := layout.problems():
            raise RuntimeError(f"DeepSpeed's shards are not one sequence of parameters back to back: {problems[0]}")
        return layout

    @property
    def module(self) -> nn.Module:
        """The net itself."""
        module: nn.Module = self.net.module
        return module

    @property
    def model_config(self) -> ModelConfig:
        """The net's, as the recipe has it."""
        return self._stage.model

    @property
    def recipe(self) -> dict[str, Any]:
        """What the stage trains: all keys of its recipe that change the result."""
        return identity(self._stage)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The conditions that the net takes, by name."""
        names: tuple[str, ...] = self.module.condition_names  # type: ignore[assignment]
        return names

    @property
    def applied_steps(self) -> int:
        """Optimizer updates since `initialise`."""
        return self._adam.applied_steps

    # ---- a step ----------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        """Adds one micro-batch's gradient.

        Args:
            loss: Scalar; each sample weighs 1/N in it, for a step of N samples over all ranks. A non-finite one spoils
                the sum, so that `step` refuses it on all ranks: the factor below is 1 for a finite loss, else NaN.
        """
        self.net.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)

    @torch.no_grad()
    def step(self) -> StepResult:
        """One optimizer step on all ranks, or on none. A collective; a rank may have run no micro-batch at all."""
        rate = self._learning_rate()
        for group in self._adam.param_groups:
            group["lr"] = rate
        compat.reduce_scatter(compat.give_gradient(self.net, 0), self._sum, self._zero.dp_process_group)
        self._sum.zero_()
        self.net.step()
        applied = bool(self.net.was_step_applied())
        self.consecutive_skips = 0 if applied else self.consecutive_skips + 1
        return StepResult(
            applied=applied,
            grad_norm=float(self.net.get_global_grad_norm()),
            loss_scale=float(self._zero.loss_scaler.cur_scale),
            learning_rate=rate,
            consecutive_skips=self.consecutive_skips,
        )

    def _learning_rate(self) -> float:
        optimizer: OptimizerConfig = self._stage.optimizer
        return learning_rate(
            optimizer,
            self.applied_steps,
            global_batch_size=self._stage.global_batch_size,
            total_steps=self._stage.total_steps,
        )

    # ---- weights and state -----------------------------------------------------------------------------------------

    def initialise(self, state: Mapping[str, torch.Tensor]) -> None:
        """Starts from fp32 weights: masters and EMA take them unrounded, moments are zero, no step is applied.

        DeepSpeed clones its masters when it is made; what is put into the net itself is overwritten at the first step.

        Args:
            state: Full state dict of the net, on any device.

        Raises:
            CheckpointError: Every missing, extra or reshaped key.
        """
        self.check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, "the initial weights")
        self._adam.seed()
        self.consecutive_skips = 0
        self.put(_from_state(state), ("master", "ema"), state)
        self.publish()

    def check_names(self, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        """Compares a state's names and shapes with the net's.

        Raises:
            CheckpointError: Every missing, extra or reshaped key.
        """
        wanted = {place.name: place.shape for place in self.layout.places}
        wanted |= {name: tuple(tensor.shape) for name, tensor in self.fixed().items()}
        lines = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in shapes]
        lines += [f"extra: {name} {tuple(shape)}" for name, shape in shapes.items() if name not in wanted]
        lines += [
            f"shape of {name}: {tuple(shapes[name])} instead of {shape}"
            for name, shape in wanted.items()
            if name in shapes and tuple(shapes[name]) != shape
        ]
        if lines:
            raise CheckpointError(
                f"{origin} do not fit the net:\n" + "\n".join(f"  - {line}" for line in lines),
                remedy="use the recipe that they were made with",
            )

    def shard(self, key: str) -> torch.Tensor:
        """This rank's flat fp32 shard of a key, `master`, `exp_avg`, …: (partition,), padding included; a view."""
        master: torch.Tensor = self._zero.single_partition_of_fp32_groups[0]
        return master.detach() if key == "master" else self._adam.state[master][key]

    def fixed(self) -> dict[str, torch.Tensor]:
        """Buffers and frozen parameters (in fp32): what lies in no shard and is equal on all ranks."""
        moving = {id(parameter) for parameter in self._zero.bit16_groups[0]}
        state = self.module.state_dict(keep_vars=True)
        return {
            name: self._frozen.get(name, tensor.detach()) for name, tensor in state.items() if id(tensor) not in moving
        }

    @torch.no_grad()
    def put(self, fill: Fill, keys: tuple[str, ...], fixed: Mapping[str, torch.Tensor]) -> None:
        """Overwrites this rank's shards, and its copy of what is in no shard; no collective. `publish` must follow.

        Args:
            fill: Gives the elements; asked for this rank's own ranges only, once for each key.
            keys: Which shards.
            fixed: Buffers and frozen parameters by name; other names are ignored.
        """
        wanted = [(place.name, start, end) for place, start, end in self.layout.of_rank(self.world.rank)]
        own = len(self.layout.own(self.world.rank))
        for key in keys:
            shard = self.shard(key)[:own]
            host = shard if shard.device.type == "cpu" else torch.empty(own)
            fill(key, wanted, host)
            shard.copy_(host)
        state = self.module.state_dict(keep_vars=True)
        for name in self.fixed():
            state[name].copy_(fixed[name])
            if name in self._frozen:
                self._frozen[name].copy_(fixed[name])

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the net's weights anew from all ranks' masters: the all-gather that also ends a step."""
        self._zero.update_lp_params()

    @torch.no_grad()
    def full(self, key: str, to: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, full fp32 parameter) one by one, so that no rank ever holds more than one.

        A collective: every rank must exhaust it.

        Args:
            key: `master`, `exp_avg`, `exp_avg_sq` or `ema`.
            to: The rank that gets them; None for all. Other ranks are yielded nothing.
        """
        mine, base, rank = self.shard(key), self.world.rank * self.layout.partition, self.world.rank
        for place in self.layout.places:
            whole = torch.empty(place.count, dtype=mine.dtype, device=mine.device)
            for owner, start, end in self.layout.pieces(place.offset, place.end):
                part = whole[start - place.offset : end - place.offset]
                if owner == rank:
                    part.copy_(mine[start - base : end - base])
                if to is None:
                    dist.broadcast(part, owner)
                elif owner != to and rank == owner:
                    dist.send(part, to)
                elif owner != to and rank == to:
                    dist.recv(part, owner)
            if to is None or to == rank:
                yield place.name, whole.view(place.shape)

    def clock(self) -> dict[str, Any]:
        """All state besides the tensors, equal on all ranks, as JSON."""
        scaler = vars(self._zero.loss_scaler)
        return {
            "precision": self.precision,
            "applied_steps": self.applied_steps,
            "consecutive_skips": self.consecutive_skips,
            "scaler": {key: scaler[key] for key in _SCALER_KEYS if key in scaler},
            "counters": {key: getattr(self.net, key) for key in _COUNTER_KEYS},
        }

    def set_clock(self, clock: Mapping[str, Any]) -> None:
        """Takes over what `clock` gave; a loss scale only from the same precision."""
        self._adam.set_applied_steps(int(clock["applied_steps"]))
        self.consecutive_skips = int(clock["consecutive_skips"])
        if clock["precision"] == self.precision:
            vars(self._zero.loss_scaler).update(clock["scaler"])
        vars(self.net).update(clock["counters"])


def _from_state(state: Mapping[str, torch.Tensor]) -> Fill:
    """Fills from a full state dict, whatever the shard."""

    def fill(key: str, wanted: Sequence[tuple[str, int, int]], out: torch.Tensor) -> None:
        torch.cat([state[name].reshape(-1)[start:end].float().cpu() for name, start, end in wanted], out=out)

    return fill


def _adding_to(place: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's fresh gradient to its place in the fp32 sum and frees it."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        place.add_(parameter.grad)
        parameter.grad = None

    return hook
