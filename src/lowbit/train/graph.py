"""Loss and gradient of a training step, captured once as a CUDA graph and replayed: no launch costs the host anything.

A step of a small model is thousands of launches of a few microseconds each, and the host is the limit. The graph holds
forward, backward and the clipping of the gradient; it reads its batch from one buffer and leaves the gradients in the
parameters, which stay where they are: the optimizer must not drop them (zero_grad(set_to_none=False) or none at all).
Nothing in it may wait for the device: `Teacher` and `next_token_loss` don't, `CachedTeacher` does.
"""

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.train.distill import Objective

_WARMUP = 3  # steps before the capture: kernels are compiled, libraries make their workspaces


class GraphedGradient:
    """A call gives (loss, norm of the gradient before clipping) on the device; gradients lie in the parameters."""

    def __init__(self, model: nn.Module, objective: Objective, ids: Tensor, clip: float, autocast: bool) -> None:
        """ids int64 [b, T], like those that will follow. Leaves parameters and buffers as they are.

        Raises InputError where there is no CUDA device, or the model does what no graph can hold.
        """
        if ids.device.type != "cuda":
            raise InputError(
                f"a step can be a CUDA graph on a CUDA device only, not on {ids.device}; leave graphed off"
            )
        self.model, self.objective, self.clip, self.autocast = model, objective, clip, autocast
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ids = ids.clone()
        self.windows = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        self._warm_up(ids.device)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.loss, self.norm = self._step()
        except RuntimeError as error:
            raise InputError(
                f"a training step of this model can't be a CUDA graph ({str(error).splitlines()[0]}); leave graphed "
                "off, --eager on the command line"
            ) from error

    def _warm_up(self, device: torch.device) -> None:
        """Run the step on a stream of its own; what it did to buffers (watched ranges) is undone."""
        before = [buffer.clone() for buffer in self.model.buffers()]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self._step()
        torch.cuda.current_stream(device).wait_stream(side)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def _step(self) -> tuple[Tensor, Tensor]:
        for parameter in self.trained:
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            loss = self.objective(self.model, self.ids, self.windows)
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(self.trained, self.clip)

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.loss, self.norm
