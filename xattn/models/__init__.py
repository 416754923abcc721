"""One file a family; names and numbers in zoo.py."""
