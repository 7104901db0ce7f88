from .simulation import SimulationResult, simulate

__all__ = ["SimulationResult", "simulate"]
