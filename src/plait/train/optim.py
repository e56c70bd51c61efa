"""Which optimiser moves which parameter: AdamW, or Muon for hidden matrices with AdamW for the rest.

Every parameter falls into one group by its name and shape:
    muon      2-D weights of linear layers inside blocks (only with Muon)
    decay     other weights of two or more dimensions: embedding, head, convolution, router, stacked experts
    no decay  one dimension: norms, biases, A_log, D, dt_bias

Numbers  float32 parameters and moments; Muon orthogonalises in bfloat16.
Source   Loshchilov and Hutter 2019, arXiv:1711.05101; Jordan 2024 (Muon) with the update size of Liu et al. 2025,
         arXiv:2502.16982, so that one learning rate serves both; decay rule of Megatron-LM.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """Settings of the optimiser.

    kind: who moves the hidden matrices. betas, eps: of AdamW. momentum: of Muon. weight_decay: of both, decoupled.
    clip: largest norm of the whole gradient; 0 for no limit.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name}={getattr(self, name)}: must lie in 0 .. 1, 1 excluded")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more; 0 turns it off")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps}: must be a small number above 0, for example 1e-8")


def groups(model: nn.Module, kind: str = "adamw") -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by group and name; groups without members are left out.

    Args:
        model: whose parameters; frozen ones (requires_grad False) belong to no group.
        kind: "adamw" or "muon".
    """
    found: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "decay": {}, "no decay": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_group(name, parameter, kind)][name] = parameter
    return {group: members for group, members in found.items() if members}


def _group(name: str, parameter: Tensor, kind: str) -> str:
    if parameter.ndim < 2:
        return "no decay"
    hidden = name.startswith("blocks.") and name.endswith(
        ("_proj.weight", "_proj.linear.weight", "latent_in.weight", "latent_out.weight")
    )
    return "muon" if kind == "muon" and hidden and parameter.ndim == 2 else "decay"


class Optimizers:
    """One or two torch optimisers behind one face; their state is known by the parameters' names."""

    def __init__(self, model: nn.Module, settings: Optim) -> None:
        """Collect the model's parameters.

        Raises: ValueError for parameters that are not float32 or if nothing is trainable.
        """
        self.settings, self.groups = settings, groups(model, settings.kind)
        self.names = {p: name for members in self.groups.values() for name, p in members.items()}
        if not self.names:
            raise ValueError("the model has no trainable parameter: every one has requires_grad=False")
        for parameter, name in self.names.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f'{name} is {parameter.dtype}: training needs masters; load with dtype="float32"')
        self.parameters = list(self.names)
        plain = [
            {"params": list(self.groups[group].values()), "weight_decay": decay}
            for group, decay in (("decay", settings.weight_decay), ("no decay", 0.0))
            if group in self.groups
        ]
        self.each: list[Optimizer] = []
        if plain:
            # the rate is set before every update
            self.each.append(AdamW(plain, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True))
        if "muon" in self.groups:
            self.each.append(
                Muon(
                    list(self.groups["muon"].values()),
                    lr=0.0,
                    weight_decay=settings.weight_decay,
                    momentum=settings.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["full_decay"] = group["weight_decay"]

    def step(self, lr: float, decay: float = 1.0) -> None:
        """Update every parameter that has a gradient, with this learning rate and so much of the weight decay."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = decay * group["full_decay"]
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as it is, by "parameter name/kind of moment"; empty before the first update."""
        return {
            f"{name}/{key}": value
            for optimizer in self.each
            for parameter, name in self.names.items()
            if parameter in optimizer.state
            for key, value in optimizer.state[parameter].items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a state that `tensors` gave, copied to the parameters' devices.

        Raises: ValueError naming a parameter that is unknown or has another shape.
        """
        owners = {self.names[p]: (optimizer, p) for optimizer in self.each for p in _members(optimizer)}
        for optimizer in self.each:
            optimizer.state.clear()
        for key, value in tensors.items():
            name, _, moment = key.rpartition("/")
            if name not in owners:
                raise ValueError(f"the saved optimiser state has {name!r}, which this model does not train")
            optimizer, parameter = owners[name]
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{key} is saved as {tuple(value.shape)}, the parameter is {tuple(parameter.shape)}")
            optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)

    def describe(self) -> list[str]:
        """One line per group: how many tensors and numbers it holds, and which."""
        lines = []
        for group, members in self.groups.items():
            decay = 0.0 if group == "no decay" else self.settings.weight_decay
            kinds = dict.fromkeys(_kind(name) for name in members)
            count = sum(p.numel() for p in members.values())
            who = "Muon" if group == "muon" else "AdamW"
            lines.append(
                f"{who}, weight decay {decay:g}: {len(members)} tensors, {count:,} numbers: {', '.join(kinds)}"
            )
        return lines


def _members(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kind(name: str) -> str:
    """A parameter's name without the number of its block."""
    return ".".join(part for part in name.split(".") if not part.isdecimal() and part != "blocks")
