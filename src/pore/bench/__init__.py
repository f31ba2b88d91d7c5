"""Benchmarks: how long prefill and decoding take, and what the machine could reach."""

from pore.bench.batch import workload_of as workload_of
from pore.bench.measuring import measure as measure
from pore.bench.measuring import measure_calibration as measure_calibration
from pore.bench.results import CalibrationResult as CalibrationResult
from pore.bench.results import SpeedResult as SpeedResult
from pore.bench.setup import build as build
from pore.bench.setup import hardware as hardware
from pore.bench.setup import versions as versions
from pore.bench.table import about as about
from pore.bench.table import table as table
from pore.bench.workload import Workload as Workload
