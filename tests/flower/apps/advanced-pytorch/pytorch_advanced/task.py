"""pytorch_advanced: the model, its data, and what a client tells of its training."""

import time
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A layer that is federated, and a head of which each client keeps its own."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


@dataclass
class TrainProcessMetadata:
    """Metadata about the training process."""

    training_time: float
    converged: bool
    training_losses: dict[str, float]


digits = None  # Cache the data


def load_digits_tensors():
    global digits
    if digits is None:
        x, y = load_digits(return_X_y=True)
        digits = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return digits


def load_data(partition_id: int, num_partitions: int):
    x, y = load_digits_tensors()
    part = slice(partition_id, 1500, num_partitions)
    data = TensorDataset(x[part], y[part])
    return DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=64)


def central_test():
    x, y = load_digits_tensors()
    return DataLoader(TensorDataset(x[1500:], y[1500:]), batch_size=64)


def train(net, trainloader, epochs, lr, device):
    """Train the model on the training set."""
    net.to(device)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    start = time.time()
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    avg_trainloss = running_loss / (len(trainloader) * epochs)
    return avg_trainloss, TrainProcessMetadata(time.time() - start, avg_trainloss < 0.5, {"last": loss.item()})


def test(net, testloader, device):
    """Validate the model on the test set."""
    net.to(device)
    criterion = torch.nn.CrossEntropyLoss()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images)
            loss += criterion(outputs, labels).item()
            correct += (torch.max(outputs.data, 1)[1] == labels).sum().item()
    return loss / len(testloader), correct / len(testloader.dataset)


def head_of(net) -> OrderedDict:
    return OrderedDict((name, value) for name, value in net.state_dict().items() if name.startswith("fc2"))
