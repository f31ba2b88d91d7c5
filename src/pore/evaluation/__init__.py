"""Right or wrong, before and after pruning: evaluation on questions with one right answer."""

from pore.evaluation.answers import is_right as is_right
from pore.evaluation.answers import normalise as normalise
from pore.evaluation.batches import Batches as Batches
from pore.evaluation.differences import compare as compare
from pore.evaluation.files import Results as Results
from pore.evaluation.files import read_results as read_results
from pore.evaluation.files import write_results as write_results
from pore.evaluation.outcome import Answer as Answer
from pore.evaluation.outcome import Outcome as Outcome
from pore.evaluation.running import evaluate as evaluate
from pore.evaluation.running import time_prefill as time_prefill
from pore.evaluation.statistics import Paired as Paired
from pore.evaluation.statistics import wilson as wilson
