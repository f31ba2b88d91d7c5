"""What pore uses of transformers, torch and accelerate that they do not promise to keep.

All of it is in this folder, with one file for every subject; each entry says what it is and why
nothing public would do. `tests/compat/` names each entry and says what it must mean, so that a
version that drops one fails there, by name.
"""
