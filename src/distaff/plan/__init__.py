"""Plans a training on devices that this machine may not have: memory, traffic and time."""

from distaff.plan.growth import GrownPlan
from distaff.plan.process import plan_recipe
from distaff.plan.result import Parameter, TrainingPlan
from distaff.plan.roofline import StepBounds
from distaff.plan.training import plan_training

__all__ = [
    "GrownPlan",
    "Parameter",
    "StepBounds",
    "TrainingPlan",
    "plan_recipe",
    "plan_training",
]
