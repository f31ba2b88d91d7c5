"""Checking that pruning is exact on this machine, with these versions and this model."""

from pore.checking.proofs import check as check
from pore.checking.proofs import prove as prove
from pore.checking.result import CheckResult as CheckResult
