"""Training: tasks, the loop, evaluation, checkpoints and reports."""

from layercomb.supervised.callbacks import Callback, Profile
from layercomb.supervised.evaluation import evaluate
from layercomb.supervised.tasks import EvalTask, TrainTask
from layercomb.supervised.training import Loop

__all__ = ['Callback', 'EvalTask', 'Loop', 'Profile', 'TrainTask', 'evaluate']
