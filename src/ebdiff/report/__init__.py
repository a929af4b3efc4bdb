"""From result files to tables, figures and one page. Reads json, npz and npy; imports no torch."""
