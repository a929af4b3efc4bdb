"""How a job lives: files, errors, devices, processes, signals, progress and randomness."""
