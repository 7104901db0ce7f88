"""Clients' devices on a virtual clock: how long work takes, who drops out, who is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from clients import randomness
from fedsim.experiment import DeviceSettings


@dataclass(frozen=True)
class Devices:
    """What clients' devices can do; every draw is keyed by client, and by the work where it changes.

    Attributes:
        said: the experiment's settings.
        seed: the experiment's seed.
    """

    said: DeviceSettings
    seed: int

    def seconds(self, clients: np.ndarray, work: int, steps: np.ndarray, down: float, up: np.ndarray) -> np.ndarray:
        """How long clients take to be sent the weights, to train and to send theirs, ``float64 [k]``.

        Args:
            clients: ``int64 [k]`` ids.
            work: what the work is keyed by beside the client: the round it began in.
            steps: ``int64 [k]`` local steps.
            down: bytes sent to each.
            up: bytes that each sends ``[k]``.
        """
        said = self.said
        speed = np.exp(said.speed_spread * self._normal("device speed", clients))
        jitter = np.exp(said.jitter * self._normal("device jitter", clients, work))
        network = np.exp(said.network_spread * self._normal("device network", clients))
        sent = np.zeros(len(clients))
        for amount, rate in ((down, said.down_mbps), (up, said.up_mbps)):
            if rate is not None:
                sent = sent + np.asarray(amount) * 8e-6 / rate
        return 2 * said.latency + said.step_seconds * steps * speed * jitter + sent * network

    def drops_out(self, clients: np.ndarray, work: int) -> np.ndarray:
        """Which clients begin their work and never end it, ``bool [k]``."""
        return self._uniform("device dropout", clients, work) < self.said.dropout

    def present(self, clients: np.ndarray, time: float) -> np.ndarray:
        """Which clients are there at a time, ``bool [k]``: each in a part of every period that begins when it likes."""
        if self.said.available == 1:
            return np.ones(len(clients), dtype=bool)
        phase = self._uniform("device phase", clients)
        return (time / self.said.period + phase) % 1.0 < self.said.available

    def _uniform(self, purpose: str, clients: np.ndarray, work: int = 0) -> np.ndarray:
        return randomness.uniforms(randomness.keys(self.seed, purpose, work, clients), 1)[:, 0]

    def _normal(self, purpose: str, clients: np.ndarray, work: int = 0) -> np.ndarray:
        return ndtri(self._uniform(purpose, clients, work).clip(1e-16))
