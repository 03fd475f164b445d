"""Factors beside the weights of a sum's terms, so that no term outweighs the others."""

from kdloss.balancing._balance import Balance
from kdloss.balancing.running_magnitude import RunningMagnitude
from kdloss.balancing.uncertainty import Uncertainty

__all__ = ["Balance", "RunningMagnitude", "Uncertainty"]
