"""Pure functions of tensors: attention, selection, merging, padding, gathering."""
