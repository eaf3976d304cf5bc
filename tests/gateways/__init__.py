"""Several gateway processes on one database: each sees the changes of the others, even if one of them is killed."""
