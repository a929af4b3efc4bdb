"""What it costs: arithmetic, measured steps, tuning."""
