"""The linear-probe evaluator: multinomial logistic regression on frozen features, solved to its one minimum.

Full batch L-BFGS in float64 over the shares of all ranks. Rank 0 decides the steps, so ranks on different machines
cannot drift apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster import distributed
from stages.evaluate.config import Linear
from stages.evaluate.features import Features
from stages.evaluate.found import Values

TOLERANCE = 1e-7  # of the largest element of the gradient


class LinearProbe:
    """Fits on construction; then `values` are those of the queries. Collective: every rank makes one.

    Attributes:
        weight_CK, bias_K: float64, on standardised features.
        gradient: the largest element of the gradient at the end.
        iterations: taken.
    """

    def __init__(self, config: Linear, train: Features, num_classes: int) -> None:
        self.config, self.train = config, train
        self.shape = (train.x_NC.shape[1] + 1, num_classes)
        self.mean_C, self.scale_C = _moments(train)
        device = train.x_NC.device
        # The parameters, and one number with which rank 0 tells the others that there is a further step.
        self._shared = torch.zeros(1 + self.shape[0] * self.shape[1], dtype=torch.float64, device=device)
        self.gradient, self.iterations = 0.0, 0
        if distributed.rank() == 0:
            self._minimise()
        else:
            while distributed.broadcast(self._shared)[0] > 0:
                self._loss_and_gradient()
        solution = self._shared[1:].view(self.shape)
        self.weight_CK, self.bias_K = solution[:-1], solution[-1]

    def values(self, query: Features) -> Values:
        """Yield `linear_top1` (percent). Collective."""
        hits = torch.zeros((), dtype=torch.int64, device=query.x_NC.device)
        for x_MC, y_M in query.chunks():
            hits += (self.logits(x_MC).argmax(1) == y_M).sum()
        yield "linear_top1", 100.0 * int(distributed.all_reduce_sum(hits)) / query.total

    def logits(self, x_MC: Tensor) -> Tensor:
        """float64 (M, K) of raw features."""
        return self._standard(x_MC) @ self.weight_CK + self.bias_K

    def notes(self) -> list[str]:
        """A warning when the iterations did not suffice."""
        if self.gradient <= 100 * TOLERANCE:
            return []
        return [
            f"linear probe: stopped after {self.iterations} iterations with a gradient of {self.gradient:.1e}; "
            "raise max_iterations or l2"
        ]

    def _minimise(self) -> None:
        parameters = torch.zeros_like(self._shared[1:], requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [parameters],
            max_iter=self.config.max_iterations,
            max_eval=4 * self.config.max_iterations,
            history_size=20,
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            self._shared[0] = 1.0
            self._shared[1:] = parameters.detach()
            distributed.broadcast(self._shared)
            loss, gradient = self._loss_and_gradient()
            parameters.grad = gradient
            return loss

        optimiser.step(closure)
        state = optimiser.state[parameters]
        self.iterations = state["n_iter"]
        assert parameters.grad is not None
        self.gradient = parameters.grad.abs().max().item()
        self._shared[0] = 0.0
        self._shared[1:] = parameters.detach()
        distributed.broadcast(self._shared)

    def _loss_and_gradient(self) -> tuple[float, Tensor]:
        """Of the whole objective at the shared parameters, on every rank."""
        solution = self._shared[1:].view(self.shape)
        weight_CK, bias_K = solution[:-1], solution[-1]
        total = torch.zeros_like(self._shared)  # the loss, then its gradient
        gradient = total[1:].view(self.shape)
        for x_MC, y_M in self.train.chunks():
            x_MC = self._standard(x_MC)
            log_p = torch.log_softmax(x_MC @ weight_CK + bias_K, 1)
            total[0] -= log_p.gather(1, y_M[:, None]).sum()
            slope = log_p.exp_()
            slope[torch.arange(len(y_M), device=y_M.device), y_M] -= 1
            gradient[:-1] += x_MC.t() @ slope
            gradient[-1] += slope.sum(0)
        total = distributed.all_reduce_sum(total) / self.train.total
        total[0] += 0.5 * self.config.l2 * weight_CK.square().sum()
        total[1:].view(self.shape)[:-1] += self.config.l2 * weight_CK
        return total[0].item(), total[1:]

    def _standard(self, x_MC: Tensor) -> Tensor:
        return (x_MC.double() - self.mean_C) / self.scale_C


def _moments(train: Features) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature over all ranks, float64 (C,); a constant feature keeps scale 1."""
    mean = torch.zeros(train.x_NC.shape[1], dtype=torch.float64, device=train.x_NC.device)
    for x_MC, _ in train.chunks():
        mean += x_MC.double().sum(0)
    mean = distributed.all_reduce_sum(mean) / train.total
    square = torch.zeros_like(mean)
    for x_MC, _ in train.chunks():
        square += (x_MC.double() - mean).square().sum(0)
    scale = (distributed.all_reduce_sum(square) / train.total).sqrt()
    return mean, torch.where(scale > 1e-12, scale, torch.ones_like(scale))
