"""A stage's optimizer: AdamW on what trains, at the end of a step or as backward passes complete the gradients."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..kernels.adamw_8bit import AdamWSettings
from ..kernels.bf16_masters import store_nearest_
from .errors import RunError, TrainingError
from .gradients import Gradients
from .optimizer_config import OptimizerConfig, is_embedding, is_head
from .parts import WHOLE, Parts, Span, cut
from .update_rules import BLOCK, Update, state_bytes, update_rule


class StageOptimizer:
    """AdamW on the parameters of a stage, as `OptimizerConfig` says.

    A step is `start_step`, then as many backward passes as it named micro-batches, then `finish_step`. With
    `needs_norm_pass`, one more backward pass comes first, inside `norm_pass`. Nothing in it waits for the device.

    Args:
        parameters: what trains, by name: bf16 or fp32, contiguous, on one device. Names tell the embedding
            ("embed_tokens"), the LM head ("lm_head") and the adapters' B (".lora_B") from the rest, and seed the random
            bits of rounding.
        config: the optimizer and its options.
        lr: peak learning rate of what has none of its own in `config`.
        seed: of the random bits of rounding, from 0 to 2^63 − 1.
        parts: what this process holds of the parameters, and updates. Gradients and states are those of its part.

    Raises:
        TrainingError: for an optimizer that this machine cannot run, and for other parameters than the above.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        *,
        lr: float,
        seed: int = 0,
        parts: Parts = WHOLE,
    ) -> None:
        self._parts = parts
        self._hooks: dict[str, RemovableHandle] = {}
        self.config, self.lr, self.seed = config, lr, seed
        self.parameters: dict[str, nn.Parameter] = {}
        self._rule = update_rule(config)
        self._states: dict[str, dict[str, Tensor]] = {}
        self._steps: dict[str, int] = {}
        self._gradients = Gradients(parts)
        self._in_step = self._measuring = False
        self._micro_batches, self._lr_factor = 1, 1.0
        self._skip: Tensor | None = None
        self._updated: set[str] = set()
        self._norm: Tensor | None = None
        self.set_parameters(parameters)

    def __del__(self) -> None:
        for hook in self._hooks.values():
            hook.remove()

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Train these from now on: keep the states of those that trained already, free the others', begin the new.

        Args:
            parameters: by name, as for the class. What is not the same object as before begins anew.

        Raises:
            TrainingError: for parameters that cannot be trained; the optimizer is then as it was.
        """
        for name, parameter in parameters.items():
            contiguous = self._parts.local(parameter.detach()).is_contiguous()
            if parameter.dtype not in (torch.bfloat16, torch.float32) or not contiguous:
                raise TrainingError(
                    f"{name} is {parameter.dtype} with strides {parameter.stride()}: what trains must be contiguous "
                    "and bf16 or fp32, so load the model in one of those"
                )
        self._in_step = False
        kept = {name: parameter for name, parameter in parameters.items() if self.parameters.get(name) is parameter}
        self._gradients.start(kept, 1)
        for name in self.parameters.keys() - kept.keys():
            self._hooks.pop(name).remove()
            del self._states[name], self._steps[name]
        self.parameters = dict(parameters)
        for name in parameters.keys() - kept.keys():
            self._states[name] = self._rule.new_state(self._weight(name))
            self._steps[name] = 0
            self._hooks[name] = parameters[name].register_post_accumulate_grad_hook(_hook(self, name))
        self._gradients.start(self.parameters, 1)

    def start_step(self, micro_batches: int, lr_factor: float, skip: Tensor | None = None) -> None:
        """Begin a step; gradients that are left of an unfinished one are dropped.

        Args:
            micro_batches: backward passes whose gradients add up.
            lr_factor: every parameter's peak learning rate is multiplied by it.
            skip: scalar on the device, bool or a number that is not 0 for true: the step then changes no weight and no
                moment, but counts in the bias corrections. It is read, on the device, when weights are updated: before
                that it may still be written to.

        Raises:
            ValueError: if `micro_batches` is below 1.
        """
        if micro_batches < 1:
            raise ValueError(f"micro_batches is {micro_batches}; a step has at least one")
        self._micro_batches, self._lr_factor, self._skip = micro_batches, lr_factor, skip
        self._gradients.start(self.parameters, micro_batches)
        self._updated, self._norm, self._in_step = set(), None, True

    @property
    def needs_norm_pass(self) -> bool:
        """Whether the step that began updates in the backward pass and has to know the norm before."""
        return self.config.in_backward and self.config.grad_clip > 0 and self._micro_batches == 1

    @contextmanager
    def norm_pass(self) -> Iterator[None]:
        """Inside it, the step's only micro-batch runs forward and backward for the norm alone: gradients are dropped.

        Outside it, after that, the same has to run again.

        Raises:
            RuntimeError: outside a step that needs it.
        """
        if not (self._in_step and self.needs_norm_pass):
            raise RuntimeError("norm_pass belongs after start_step, in a step that needs_norm_pass")
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
        for name in self._gradients.buffered:
            self._gradients.measure_and_drop(name)
        self._norm = self._gradients.norm()

    def gradient_norm(self) -> Tensor | None:
        """Global norm of the gradients before clipping, where it is known before the first weight changes.

        Returns:
            fp32 scalar on the device: after `norm_pass`, or after the last backward pass of a step that updates at its
            end. None after one that updated weights in it without `norm_pass`.
        """
        if self._norm is None and not self._updated:
            for name in self._pending():
                self._gradients.measure(name)
            self._norm = self._gradients.norm()
        return self._norm

    @torch.no_grad()
    def finish_step(self, skip: Tensor | None = None) -> Tensor:
        """End the step: update what was not updated in the backward passes, drop the gradients.

        Parameters without a gradient stay as they are. A norm that is not finite skips the step as `skip` does. Where
        weights are updated in the backward pass and nothing is clipped, the global norm is not known in time, and each
        parameter goes by its own.

        Args:
            skip: as of `start_step`; where either is true, the step is skipped.

        Returns:
            Global norm of the gradients before clipping, an fp32 scalar on the device.

        Raises:
            RuntimeError: without `start_step`.
            ValueError: if `skip` comes too late, weights being updated already.
        """
        if not self._in_step:
            raise RuntimeError("finish_step belongs after start_step")
        if self._updated and skip is not None and skip is not self._skip:
            raise ValueError("weights were updated in the backward pass already: give `skip` to start_step")
        pending = self._pending()
        norm = self.gradient_norm()
        if norm is None:  # of the updated ones it was measured on the way
            for name in pending:
                self._gradients.measure(name)
            norm = self._gradients.norm()
        self._update(pending, norm, skip)
        self._in_step = False
        return norm

    def gradient_buffer(self, name: str) -> Tensor | None:
        """Where the kernels of the embedding and of the LM head can add their gradient in fp32, for `weight_grad`.

        Args:
            name: of a parameter that trains.

        Returns:
            fp32 buffer in the parameter's shape that is zero when a step begins, or None where the parameter's own
            `.grad` serves: for fp32 parameters, for any but the embedding and the LM head, and for what several
            processes share.
        """
        if self.parameters[name].dtype == torch.float32 or not (is_embedding(name) or is_head(name)):
            return None
        if not self._parts.takes_buffer(name):
            return None
        return self._gradients.buffer(name)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a bit-exact resume needs, between two steps: the optimizer's own tensors, not copies of them.

        Returns:
            By "KIND.NAME": masters and moments; `weight` where no fp32 master gives it; `step` (int64, on the CPU), the
            number of steps.
        """
        tensors = {}
        for name in self.parameters:
            if "master" not in self._states[name]:
                tensors[f"weight.{name}"] = self._weight(name)
            tensors.update({f"{kind}.{name}": tensor for kind, tensor in self._states[name].items()})
            tensors[f"step.{name}"] = torch.tensor(self._steps[name])
        return tensors

    def state_spans(self) -> dict[str, Span | None]:
        """Where the entries of each of `state_tensors` lie in that of the whole parameter; None for `step`.

        Those of a part without entries say nothing.
        """
        spans: dict[str, Span | None] = {}
        for key, tensor in self.state_tensors().items():
            kind, _, name = key.partition(".")
            if kind == "step":
                spans[key] = None
                continue
            first, total = self._parts.span(name, self.parameters[name])
            size = 1 if tensor.numel() == self._weight(name).numel() else BLOCK
            spans[key] = Span(first // size, -(-total // size))
        return spans

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave, the weights included.

        Raises:
            RunError: if something is missing or does not fit; nothing is changed then.
        """
        own = self.state_tensors()
        for key, tensor in own.items():
            if not _fits(tensors.get(key), tensor):
                found = f"{tensors[key].dtype} {list(tensors[key].shape)}" if key in tensors else "missing"
                raise RunError(
                    f"the saved {key} is {found}, not {tensor.dtype} {list(tensor.shape)}: it was saved by another "
                    "stage or optimizer; go back to those, or start the stage anew in an empty folder"
                )
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        for name in self.parameters:
            self._steps[name] = int(tensors[f"step.{name}"])
            if "master" in self._states[name]:
                store_nearest_(self._weight(name).view(-1), self._states[name]["master"])

    @torch.no_grad()
    def inherit(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Go on from the state of another stage, by its `state_tensors`; weights stay as they are.

        A parameter inherits moments and number of steps if it trained there under the same name, in the same shape and
        with the same optimizer. It inherits its master too if that still rounds to the weight.

        Args:
            tensors: of whole parameters.

        Returns:
            Names of the parameters that inherit.
        """
        own, spans, heirs = self.state_tensors(), self.state_spans(), []
        fits = {key: tensor for key, tensor in tensors.items() if _is_of_whole(tensor, own.get(key), spans.get(key))}
        tensors = {key: cut(tensor, own[key], spans[key]) for key, tensor in fits.items()}
        for name in self.parameters:
            state = {f"{kind}.{name}": tensor for kind, tensor in self._states[name].items()}
            fit = all(_fits(tensors.get(key), tensor) for key, tensor in state.items())
            if not fit or f"step.{name}" not in tensors:
                continue
            same_weight = self._rounds_to_weight(name, tensors)
            for key, tensor in state.items():
                if same_weight or not key.startswith("master"):
                    tensor.copy_(tensors[key])
            self._steps[name] = int(tensors[f"step.{name}"])
            heirs.append(name)
        return heirs

    def _rounds_to_weight(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the weight is what it was when `tensors` were taken; without masters, it does not matter."""
        weight, rounded = self._weight(name).view(-1), None
        if "master" in self._states[name]:
            rounded = torch.empty_like(weight)
            store_nearest_(rounded, tensors[f"master.{name}"].to(weight.device))
        elif len(self._states[name].get("master_low", ())):
            rounded = tensors[f"weight.{name}"].to(weight.device).view(-1)
        return rounded is None or torch.equal(rounded, weight)

    def state_bytes(self) -> dict[str, int]:
        """Bytes held now, by kind: `masters`, `moments` and `gradients`, the last with `.grad`."""
        return {
            **state_bytes(self._states.values()),
            "gradients": sum(tensor.nbytes for tensor in self.gradient_tensors()),
        }

    def free_gradients(self) -> None:
        """Give back, between two steps, the memory in which gradients add up, but for the kernels' buffers."""
        for name in self.parameters:
            self._gradients.drop(name, free=True)

    def gradient_tensors(self) -> list[Tensor]:
        """The gradients that are held now, and the buffers that kernels add to."""
        return self._gradients.tensors()

    @torch.no_grad()
    def _take_gradient(self, name: str) -> None:
        """Runs when a backward pass has completed a parameter's gradient."""
        if not self._in_step:
            return
        if name in self._gradients.buffered:
            self._gradients.add_to_buffer(name)
        elif self._measuring:
            self._gradients.measure_and_drop(name)
        elif self._gradients.take(name) and self.config.in_backward:
            if self.config.grad_clip == 0:
                self._gradients.measure(name)
                self._update([name], self._gradients.norm(name))
            elif self._norm is not None:
                self._update([name], self._norm)

    def _pending(self) -> list[str]:
        """Parameters that have a gradient and are not updated yet."""
        return [n for n in self.parameters if n not in self._updated and self._gradients.of(n) is not None]

    def _update(self, names: Sequence[str], norm: Tensor, skip: Tensor | None = None) -> None:
        """Update parameters whose gradients are complete, and drop these."""
        clip = self.config.grad_clip
        factor = (clip / (norm + 1e-6)).clamp_max(1.0) if clip > 0 else torch.ones_like(norm)
        skipped = norm.isfinite().logical_not()
        for given in (self._skip, skip):
            if given is not None:
                skipped = skipped | given.bool()
        updates = []
        for name in names:
            gradient, weight = self._gradients.complete(name), self._weight(name)
            self._steps[name] += 1
            if weight.numel():
                updates.append(Update(weight, gradient, self._states[name], self._settings(name)))
        if updates:
            self._rule.update(updates, factor, skipped)
        for name in names:
            self._gradients.drop(name, free=self.config.in_backward)
        self._updated.update(names)

    def _settings(self, name: str) -> AdamWSettings:
        config = self.config
        lr, weight_decay = config.lr_and_weight_decay(name, self.parameters[name].dim(), self.lr)
        return AdamWSettings(
            *(lr * self._lr_factor, config.beta1, config.beta2, config.eps, weight_decay),
            # By the name alone: what else trains must change no rounding.
            *(self._steps[name], self.seed, zlib.crc32(name.encode())),
            self._parts.span(name, self.parameters[name]).first,
        )

    @torch.no_grad()
    def _weight(self, name: str) -> Tensor:
        """What this process holds of a parameter."""
        return self._parts.local(self.parameters[name].detach())


def _hook(optimizer: StageOptimizer, name: str) -> Callable[[Tensor], None]:
    """What a parameter runs; it must not keep the optimizer, and with it the states, alive."""
    reference = weakref.ref(optimizer)

    def take_gradient(parameter: Tensor) -> None:
        owner = reference()
        if owner is not None and parameter.grad is not None:
            owner._take_gradient(name)

    return take_gradient


def _is_of_whole(given: Tensor, own: Tensor | None, span: Span | None) -> bool:
    if own is None or span is None:
        return own is not None
    return given.numel() == span.total or own.numel() == given.numel() == 0


def _fits(given: Tensor | None, own: Tensor) -> bool:
    return given is not None and given.shape == own.shape and given.dtype == own.dtype
