"""Results to tables, figures and one offline page."""
