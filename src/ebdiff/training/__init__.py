"""Training: one loop, its resumable state, its ledger."""
