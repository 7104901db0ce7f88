"""legacyexample: A Flower / PyTorch app."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from legacyexample.task import Net, get_weights, load_data, set_weights, test, train


# Define Flower Client and client_fn
class FlowerClient(NumPyClient):
    def __init__(self, net, trainset, valset, local_epochs):
        self.net = net
        self.trainset = trainset
        self.valset = valset
        self.local_epochs = local_epochs

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        train_loss = train(self.net, self.trainset, self.local_epochs)
        return get_weights(self.net), len(self.trainset[1]), {"train_loss": train_loss}

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.valset)
        return loss, len(self.valset[1]), {"accuracy": accuracy}


def client_fn(context: Context):
    # Load model and data
    net = Net()
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    trainset, valset = load_data(partition_id, num_partitions)
    local_epochs = context.run_config["local-epochs"]

    # Return Client instance
    return FlowerClient(net, trainset, valset, local_epochs).to_client()


# Flower ClientApp
app = ClientApp(client_fn)
