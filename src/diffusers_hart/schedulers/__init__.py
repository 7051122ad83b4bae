from .scheduling_hart import HARTScheduler, HARTSchedulerOutput
from .scheduling_hart_residual import HARTResidualScheduler


__all__ = ["HARTResidualScheduler", "HARTScheduler", "HARTSchedulerOutput"]
