"""Training views: what a student sees of an image."""
