"""KL(original || model) on windows of text and its gradient, a few tokens' logits at a time.

The original's last hidden states are taken once, 2 K bytes a token, and its head makes its logits of them again. With p
the original's softmax, q the model's, M tokens and z its logits

    KL = 1/M sum_m sum_v p_mv (log p_mv - log q_mv)        dKL/dz = (q - p) / M

so the gradient needs neither logarithms nor all logits at once: each part of the hidden states [T, K] goes through the
head, forward and backward, before the next; then the decoder's backward runs once. On a GPU a step is a CUDA graph:
a step of a small model is thousands of launches, and the host would be the limit.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.errors import MethodError
from lowbit.model.capturable import Capturable
from lowbit.numerics.metrics import kl_divergence
from lowbit.observe.head import Head, decoder_name

CPU_LOGITS, GPU_LOGITS = 1 << 23, 1 << 28  # numbers in one part's logits: a CPU's caches hold 32 MB
_WARMUP = 3  # steps before a capture: kernels are compiled, libraries make their workspaces
_AT_ONCE = 4  # windows a forward without gradients takes


class Divergence:
    """How far `model` is from `original` on ids [samples, T]; both on one device, the original unchanged meanwhile.

    Raises MethodError for a model whose head reads more than hidden states.
    """

    def __init__(self, model: nn.Module, original: nn.Module, ids: Tensor) -> None:
        self.device = next(model.parameters()).device
        self.ids = ids.to(self.device)
        self.model, self._decoder = model, model.get_submodule(decoder_name(model))
        self._head, self._original_head = Head(model), Head(original)
        decoder = original.get_submodule(decoder_name(original))
        with torch.no_grad(), self.precision():
            parts = [self._hidden(decoder, part) for part in self.ids.split(_AT_ONCE)]
            self._wanted = torch.cat(parts)  # [samples, T, K]
            self._check_head(original)
        vocabulary = cast("Any", original).config.get_text_config().vocab_size
        self._rows = max((CPU_LOGITS if self.device.type == "cpu" else GPU_LOGITS) // vocabulary, 1)

    def precision(self) -> torch.autocast:
        """The context in which both models run: bfloat16 products on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def _hidden(self, decoder: Callable[..., Any], ids: Tensor) -> Tensor:
        return cast("Tensor", decoder(input_ids=ids, use_cache=False).last_hidden_state)

    def _check_head(self, original: nn.Module) -> None:
        whole = cast("Any", original)(input_ids=self.ids[:1, :64], use_cache=False).logits[0].float()
        again = self._original_head(self._hidden(original.get_submodule(decoder_name(original)), self.ids[:1, :64])[0])
        if not torch.allclose(whole, again, rtol=1e-2, atol=1e-2):
            raise MethodError(
                f"{type(original).__name__} makes its logits of more than hidden states, so its rounding can't be "
                "learned; use --method aligned"
            )

    @torch.no_grad()
    def mean(self, numbers: Tensor) -> float:
        """KL in nats a token on the windows of these numbers int64 [b]."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in numbers.split(_AT_ONCE):
            with self.precision():
                hidden = self._hidden(self._decoder, self.ids[part]).flatten(0, 1)  # [b, T, K] -> [M, K]
                wanted = self._wanted[part].flatten(0, 1)
                for x, t in zip(hidden.split(self._rows), wanted.split(self._rows), strict=True):
                    total += kl_divergence(self._original_head(t), self._head(x)).double().sum()
        return total.item() / (len(numbers) * self.ids.shape[1])

    def add_gradient(self, numbers: Tensor) -> None:
        """Add the gradient of `mean` on these windows to the parameters'."""
        self._backward(self._decoder, self.ids[numbers], self._wanted[numbers])

    def _backward(self, decoder: Callable[..., Any], ids: Tensor, wanted: Tensor) -> None:
        with self.precision():
            hidden = self._hidden(decoder, ids).flatten(0, 1)  # [b, T, K] -> [M, K]
        leaf = hidden.detach().requires_grad_()
        for x, t in zip(leaf.split(self._rows), wanted.flatten(0, 1).split(self._rows), strict=True):
            with self.precision():
                logits = self._head(x)
                with torch.no_grad():
                    p = torch.softmax(self._original_head(t), dim=-1)
                    slope = torch.softmax(logits, dim=-1).sub_(p).div_(len(leaf))
            logits.backward(slope)
        hidden.backward(leaf.grad)

    def graphed(self, windows: int, parameters: list[nn.Parameter]) -> Callable[[Tensor], None]:
        """`add_gradient` to gradients of zero, for so many windows, as one CUDA graph.

        Raises RuntimeError for a model that does what no graph can hold. Gradients stay in place from then on.
        """
        ids, wanted = self.ids[:windows].clone(), self._wanted[:windows].clone()
        decoder = Capturable(cast("Any", self._decoder))

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            self._backward(decoder, ids, wanted)

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(numbers: Tensor) -> None:
            ids.copy_(self.ids[numbers])
            wanted.copy_(self._wanted[numbers])
            graph.replay()

        return replay
