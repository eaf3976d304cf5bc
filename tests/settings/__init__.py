"""Settings: their sources, their checks, and what is printed of them."""
