"""The pruning methods, one published method a file, and what they have in common.

A file that defines a method is named nowhere: `registry` imports whatever lies in this folder.
"""

from pore.methods.registry import built_in, methods

built_in()

__all__ = ["built_in", "methods"]
