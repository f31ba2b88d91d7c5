"""The vision tower: what methods declare of it, and how it is hooked."""
