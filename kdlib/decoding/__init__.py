"""From image files to pixels, in processes of their own. NumPy and Pillow alone, so that these start in a fraction of a second."""
