"""The command line: one file a command, which takes one frozen dataclass of its options."""
