"""Saved files: written whole, sealed with a checksum, and trusted in nothing when they are read.

`parsing` reads JSON of any origin within bounds, `seals` adds and compares checksums, `forms` says
what a document of one schema must hold, and `saved` makes a class that can be saved of that;
`stages` is for several of them in one file, `hub` for those that go to the Hugging Face hub.
"""
