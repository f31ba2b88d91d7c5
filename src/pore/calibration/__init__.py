"""Calibration: the mean attention over a data set, exact, mergeable and resumable."""

from pore.calibration.calibrating import calibrate as calibrate
from pore.calibration.calibrating import calibrate_guide as calibrate_guide
from pore.calibration.host import HostCalibration as HostCalibration
from pore.calibration.sums import Calibration as Calibration
