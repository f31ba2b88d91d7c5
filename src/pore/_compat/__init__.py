"""What pore uses of transformers, torch and accelerate that they do not promise to keep.

All of it is in this folder, a file a subject, each thing with what it is and why nothing public
does. `tests/compat/` names each and says what it must mean, so that a version that drops one fails
there and by name.
"""
