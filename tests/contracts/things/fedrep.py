"""FedRep: a shared body, a head of each client's own (Collins et al. 2021, "Exploiting shared representations")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fedsim
from clients import ClientData, LocalContext, LocalTraining


class BodyAndHead(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def own_names(examples: int = 480, clients: int = 8) -> fedsim.Source:
    """Three groups of points, which every client numbers in its own way: a shared head cannot do it."""
    draw = torch.Generator().manual_seed(0)
    owner = torch.arange(examples) % clients
    group = torch.randint(0, 3, (examples,), generator=draw)
    x = 2 * torch.randn(3, 8, generator=draw)[group] + torch.randn(examples, 8, generator=draw)
    names = torch.stack([torch.randperm(3, generator=draw) for _ in range(clients)])
    return fedsim.Source(train={"x": x, "y": names[owner, group]}, clients=owner)


class FedRep(LocalTraining):
    """First ``head_epochs`` on the head with the body frozen, then ``body_epochs`` on the body with the head frozen.

    The head is what ``client.personal`` names.
    """

    def __init__(self, head_epochs: int = 5, body_epochs: int = 1):
        self.head_epochs, self.body_epochs = head_epochs, body_epochs

    def train(self, model: nn.Module, data: ClientData, ctx: LocalContext) -> dict[str, float | Tensor]:
        steps, total = 0, 0.0
        for personal, epochs in ((True, self.head_epochs), (False, self.body_epochs)):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_((name in ctx.personal) == personal)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=ctx.lr)
            for batch in data.batches(ctx.recipe.batch_size, epochs):
                optimizer.zero_grad()
                losses = ctx.task.loss(ctx.task.forward(model, batch), batch)
                assert isinstance(losses, Tensor)  # a task may give weights too
                loss = losses.mean()
                loss.backward()
                optimizer.step()
                steps, total = steps + 1, total + loss.item()
        return {"loss": total / steps, "steps": steps}
