"""Data: samples, prompts and models from files."""
