"""legacyexample: A Flower / PyTorch app."""

from collections import OrderedDict

import torch
import torch.nn as nn
from sklearn.datasets import load_digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.layers(x)


digits = None  # Cache the data


def load_data(partition_id: int, num_partitions: int):
    global digits
    if digits is None:
        x, y = load_digits(return_X_y=True)
        digits = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    x, y = digits
    part = slice(partition_id, 1500, num_partitions)
    return (x[part], y[part]), (x[1500:], y[1500:])


def train(net, data, epochs):
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
    return loss.item()


def test(net, data):
    x, y = data
    with torch.no_grad():
        outputs = net(x)
    return nn.functional.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()


def get_weights(net):
    return [val.cpu().numpy() for _, val in net.state_dict().items()]


def set_weights(net, parameters):
    params_dict = zip(net.state_dict().keys(), parameters, strict=True)
    state_dict = OrderedDict({k: torch.tensor(v) for k, v in params_dict})
    net.load_state_dict(state_dict, strict=True)
