"""Checking that pruning is exact on this machine, with these versions and this model."""

from pore.checking.proofs import CheckResult as CheckResult
from pore.checking.proofs import check as check
from pore.checking.proofs import prove as prove
