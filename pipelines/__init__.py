"""The stages of dvc.yaml, one file each; the command line calls the same functions."""
