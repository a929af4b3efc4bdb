"""What an experiment will take, told before anything runs."""
