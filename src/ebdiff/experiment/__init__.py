"""What is asked: the typed experiment, where its files lie and which stages make them."""
