"""Every line that knows Ray."""
