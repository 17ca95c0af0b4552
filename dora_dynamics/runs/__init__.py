"""Run directories: how they are written, how strictly they are read, what is measured anew."""
