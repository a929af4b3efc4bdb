"""From items to images and back."""
