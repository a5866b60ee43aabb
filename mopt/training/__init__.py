"""What train.py is made of. Needs the extra `[train]`."""

from mopt.training.config import Config
from mopt.training.data import Dataset
from mopt.training.data import load_dataset
from mopt.training.data import normalise
from mopt.training.files import UNFINISHED
from mopt.training.knee_search import check_resumable
from mopt.training.knee_search import search
from mopt.training.network import load
from mopt.training.network import Network
from mopt.training.program import check_fit
from mopt.training.single_run import run

__all__ = (
  'check_fit',
  'check_resumable',
  'Config',
  'Dataset',
  'load',
  'load_dataset',
  'Network',
  'normalise',
  'run',
  'search',
  'UNFINISHED',
)
