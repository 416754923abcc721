"""Parts shared by two models or more."""
