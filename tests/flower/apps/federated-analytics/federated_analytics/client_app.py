"""federated_analytics: A Flower / NumPy app for federated analytics."""

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_iris

# Flower ClientApp
app = ClientApp()


def get_clientapp_dataset(partition_id: int, num_partitions: int):
    dataset = load_iris(as_frame=True)["data"]
    return dataset[partition_id::num_partitions]


@app.query()
def query(msg: Message, context: Context):
    """Construct histogram of local dataset and report to `ServerApp`."""

    # Read the node_config to fetch data partition associated to this node
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    selected_features = msg.content["config"]["selected_features"]

    dataset = get_clientapp_dataset(partition_id, num_partitions)

    metrics = {}
    # Compute some statistics for each column in the dataframe
    for feature_name in selected_features:
        freqs, _ = np.histogram(dataset[feature_name], bins=np.linspace(2.0, 10.0, 10))
        metrics[feature_name] = freqs.tolist()
    metrics["count"] = len(dataset)

    reply_content = RecordDict({"query_results": MetricRecord(metrics)})
    return Message(reply_content, reply_to=msg)
