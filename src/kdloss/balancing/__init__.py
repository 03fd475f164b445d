"""What the terms of a sum are multiplied by besides their weights, so that none drowns the others."""

from kdloss.balancing._balance import Balance
from kdloss.balancing.running_magnitude import RunningMagnitude
from kdloss.balancing.uncertainty import Uncertainty

__all__ = ["Balance", "RunningMagnitude", "Uncertainty"]
