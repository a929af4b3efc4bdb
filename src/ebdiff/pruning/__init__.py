"""Structured pruning: groups, importances, the channel rule, surgery."""
