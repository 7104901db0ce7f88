"""The process that workers are forked from: it has torch loaded, so a worker costs little time and memory.

A fresh interpreter, started by :mod:`fedsim.engines.processes`, so a user's script needs no ``__main__`` guard. It ends
when the driver's end of its socket closes, however that came about, and so does each worker.
"""

from __future__ import annotations

import os
import signal
import socket


def main(control: int) -> None:
    """Forks a worker for each descriptor that comes over ``control``; returns when the driver is gone."""
    import torch

    import fedsim.worker  # noqa: F401  (loaded once here, inherited by every worker)

    torch.set_num_threads(1)
    # Workers are reaped by the kernel; an interrupt at the terminal is the driver's to handle.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=control)
    while True:
        try:
            word, fds, _, _ = socket.recv_fds(sock, 1, 1)
        except OSError:
            return
        if not word:
            return
        if os.fork() == 0:
            sock.close()
            _work(fds[0])
        os.close(fds[0])


def _work(fd: int) -> None:
    """A worker's whole life; never returns."""
    from fedsim.engines.processes import serve

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        serve(socket.socket(fileno=fd))
    finally:
        os._exit(1)
