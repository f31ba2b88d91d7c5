"""Pruned models that answer others: servers, and clients of servers that prune."""
