"""Saved files: read with bounds, checked by a checksum, written whole."""
