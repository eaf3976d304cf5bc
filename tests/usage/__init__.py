"""Usage records: what is written of completions, and what is read of it."""
