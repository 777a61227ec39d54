"""Data sets: a folder of images and labels, whatever source wrote it."""
