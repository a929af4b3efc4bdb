"""Images: where they come from and how training sees them."""
