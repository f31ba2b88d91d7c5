"""Saved files: written whole, sealed with a checksum, and fully checked when they are read.

`parsing` reads JSON of any origin within bounds, `seals` adds and compares checksums, `forms` says
what a document of one schema must hold, and `saved` uses these for classes that can be saved.
`stages` puts several values into one file, `hub` exchanges them with the Hugging Face hub.
"""
