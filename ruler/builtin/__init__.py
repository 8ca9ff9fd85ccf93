"""Data of our own making that RULER's tasks use where no data folder is given; `make.py` writes the files."""
