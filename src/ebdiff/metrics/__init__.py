"""Quality: features, then statistics, then a number."""
